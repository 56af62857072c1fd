"""Grow neural networks while they train."""

from growkern import ops
from growkern.backend import use_backend
from growkern.grower import Grower, GrowthEvent
from growkern.look import Bottlenecks, bottlenecks
from growkern.moments import Moments, collect
from growkern.neurons import METHODS, NewNeurons, solve
from growkern.sites import GrowthSite, find_sites
from growkern.surgery import apply
from growkern.widen import widen

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Bottlenecks",
    "Grower",
    "GrowthEvent",
    "GrowthSite",
    "Moments",
    "NewNeurons",
    "apply",
    "bottlenecks",
    "collect",
    "find_sites",
    "ops",
    "solve",
    "use_backend",
    "widen",
]
