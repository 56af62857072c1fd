"""From settings to everything that training starts with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from growkern import Grower
from growkern.training import tasks
from growkern.training.batches import choose_device, first_batch, seed_all
from growkern.training.checkpoint import Progress, State
from growkern.training.settings import NEVER, Settings


@dataclasses.dataclass
class Start:
    """What a run starts with.

    Attributes
    ----------
    task : Task
        With batches for data.
    state : State
        Before the first epoch.
    first : tuple
        Arguments of the model, and the target, of one batch, on which costs are counted.
    """

    task: tasks.Task
    state: State
    first: tuple[tuple[Any, ...], Any]


def prepare(settings: Settings) -> Start:
    """Make task, model, optimizer and grower.

    Parameters
    ----------
    settings : Settings
        What they are to be.

    Returns
    -------
    Start
        Everything before the first epoch; nothing has been written.

    Raises
    ------
    ValueError
        If the data, the device or the model cannot be had, or the model cannot grow and is meant to.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    task = tasks.make(settings, device)
    seed_all(settings.seed, 0, task.train)
    model = task.model.to(device)
    if not any(True for _ in model.parameters()):
        raise ValueError("model: it has no parameters to train")
    if strange := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise ValueError(f"model: its state_dict holds {strange[0]!r}, which is no tensor and fits no checkpoint")
    optimizer = make_optimizer(model, settings)
    state = State(model, optimizer, make_grower(task, optimizer, settings), Progress())
    first = first_batch(task.train, device)
    _locate(state.grower, first, settings)
    return Start(task, state, first)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make the optimizer that settings name, over all parameters."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(model.parameters(), rate, (0.9, settings.beta2), weight_decay=decay, fused=True)


def make_grower(task: tasks.Task, optimizer: torch.optim.Optimizer, settings: Settings) -> Grower:
    """Make the grower that settings describe."""
    return Grower(
        task.model,
        optimizer,
        task.loss_fn,
        sites=task.sites,
        method="tiny" if settings.method == NEVER else settings.method,
        neurons="auto" if settings.neurons == "auto" else int(settings.neurons),
        where=settings.where,
        when="pays" if settings.schedule == "pays" and settings.method != NEVER else "always",
        kernel=settings.kernel,
        paired=settings.paired,
        held_out=settings.held_out,
        max_neurons=settings.max_neurons or None,
        max_parameters=settings.max_parameters or None,
    )


def _locate(grower: Grower, first: tuple[Any, Any], settings: Settings) -> None:
    """Find the sites; a network that never grows may have none."""
    try:
        found = grower.locate([first])
    except (RuntimeError, ValueError):
        if settings.method != NEVER:
            raise
        grower.sites = found = []
    maps = [site.name for site in found if isinstance(grower.model.get_submodule(site.producer), nn.Conv2d)]
    if settings.method == "joint" and settings.kernel == "full" and maps:
        raise ValueError(f"kernel: 'joint' needs 'center' for convolutions such as {maps[0]!r}, got 'full'")
