"""Train and grow networks without writing a loop: what stands behind the command line."""

from growkern.training.checkpoint import load_model
from growkern.training.loop import Watcher, resume, train
from growkern.training.run import Run
from growkern.training.settings import Settings
from growkern.training.tasks import Task

__all__ = ["Run", "Settings", "Task", "Watcher", "load_model", "resume", "train"]
