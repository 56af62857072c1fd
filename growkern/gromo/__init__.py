"""A drop-in under gromo: its growing modules measure and solve through `growkern.ops`."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from growkern.gromo import updates
from growkern.gromo.statistics import NAMES, Batch, Conv2dBatch, LinearBatch, NotCovered, Shared

__all__ = ["Acceleration", "accelerate"]

VERSION = "0.1.0"  # whose functions are replaced

# What was replaced, and by how many accelerations that are not undone yet.
_originals: list[tuple[Any, str, Any]] = []
_in_force = 0

_HALF = (torch.float16, torch.bfloat16)

_shared: ContextVar[Shared | None] = ContextVar("growkern_gromo_shared", default=None)


class Acceleration:
    """What `accelerate` gives: a context manager that undoes it on leaving, or `undo` whenever wanted."""

    def __init__(self) -> None:
        self._undone = False

    def undo(self) -> None:
        """Put gromo's own functions back, unless another acceleration is still in force; once is enough."""
        global _in_force
        if self._undone:
            return
        self._undone = True
        _in_force -= 1
        while _originals and not _in_force:
            owner, name, original = _originals.pop()
            setattr(owner, name, original)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def accelerate() -> Acceleration:
    """Make gromo's Linear and Conv2d growing modules compute statistics and updates through `growkern.ops`.

    From the call on, in the whole process and for modules that exist already: the same attributes, with the same
    numbers up to rounding, and the same exceptions. Functions are replaced in memory; nothing of gromo changes on
    disk. What is not covered runs gromo's own code: merge modules, and methods that a subclass overrides.

    Returns
    -------
    Acceleration
        ``with accelerate(): ...`` undoes it on leaving; ``accelerate().undo()`` at any time. Calls nest: gromo's
        own functions are back once all are undone.

    Raises
    ------
    ImportError
        If gromo is not installed, or is another version than 0.1.0.
    """
    global _in_force
    if not _in_force:
        _replace_all()
    _in_force += 1
    return Acceleration()


def _replace_all() -> None:
    try:
        version = importlib.metadata.version("gromo")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"gromo: not installed; pip install 'gromo=={VERSION}'") from None
    if version != VERSION:
        raise ImportError(f"gromo: expected version {VERSION}, got {version}")
    from gromo.containers import growing_block
    from gromo.modules import conv2d_growing_module, growing_module, linear_growing_module
    from gromo.utils import tensor_statistic

    linear, conv2d = linear_growing_module.LinearGrowingModule, conv2d_growing_module.Conv2dGrowingModule
    restricted = conv2d_growing_module.RestrictedConv2dGrowingModule
    full = conv2d_growing_module.FullConv2dGrowingModule

    def batch(module: Any) -> Batch:
        if isinstance(module, linear):
            return LinearBatch(module, linear)
        return Conv2dBatch(module, conv2d, "full" if isinstance(module, full) else "center")

    names = {vars(kind)[m]: NAMES[m] for kind in (linear, conv2d, restricted, full) for m in NAMES if m in vars(kind)}
    _replace(tensor_statistic.TensorStatistic, "update", _update(batch, names))
    covered = (linear, conv2d)
    _replace(growing_module.GrowingModule, "update_computation", _sharing(batch, covered, lambda module: module))
    _replace(growing_block.GrowingBlock, "update_computation", _sharing(batch, covered, lambda b: b.second_layer))
    _replace(growing_module.GrowingModule, "_auxiliary_compute_alpha_omega", _in_full_precision)
    for kind in (linear, conv2d):
        _replace(kind, "layer_of_tensor", _made_in_dtype_of_module)
    _replace(restricted, "linear_layer_of_tensor", _made_in_dtype_of_module)
    for kind in (growing_module.GrowingModule, growing_block.GrowingBlock):
        _replace(kind, "extended_forward", _keeping_half_precision)
    _replace(growing_module, "optimal_delta", _optimal_delta)
    _replace(growing_module, "compute_optimal_added_parameters", _compute_optimal_added_parameters)


def _replace(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    original = vars(owner)[name]
    _originals.append((owner, name, original))
    setattr(owner, name, functools.wraps(original)(make(original)))


Method = Callable[..., Any]


def _update(batch: Callable[[Any], Batch], names: dict[Any, str]) -> Callable[[Method], Method]:
    """Wrap TensorStatistic.update: what it adds comes from growkern's ops where they cover it."""

    def compute(function: Any, kwargs: dict[str, Any]) -> tuple[Tensor, int] | None:
        name = names.get(getattr(function, "__func__", None))
        if name is None:
            return None
        module, shared = function.__self__, _shared.get()
        if shared is not None and not kwargs and (found := shared.take(module, name)) is not None:
            return found
        try:
            return getattr(batch(module), name)(**kwargs)
        except NotCovered:
            return None

    def make(original: Method) -> Method:
        def update(self: Any, count_samples: bool = True, **kwargs: Any) -> tuple[Tensor, int] | None:
            function = self._update_function
            found = None if self.updated else compute(function, kwargs)
            if found is None:
                return original(self, count_samples, **kwargs)
            self._update_function = lambda **_: found
            try:
                return original(self, count_samples, **kwargs)
            finally:
                self._update_function = function

        return update

    return make


def _sharing(
    batch: Callable[[Any], Batch], covered: tuple[type, ...], consumer: Callable[[Any], Any]
) -> Callable[[Method], Method]:
    """Wrap update_computation: the statistics that it updates share an op and do not outlive the call."""

    def make(original: Method) -> Method:
        def update_computation(self: Any, *args: Any, **kwargs: Any) -> Any:
            module = consumer(self)
            token = _shared.set(Shared(batch(module)) if isinstance(module, covered) else None)
            try:
                return original(self, *args, **kwargs)
            finally:
                _shared.reset(token)

        return update_computation

    return make


def _in_full_precision(original: Method) -> Method:
    """Wrap a method that multiplies statistics: not in the precision of autocast."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(torch.device(self.device).type, enabled=False):
            return original(self, *args, **kwargs)

    return method


def _made_in_dtype_of_module(original: Method) -> Method:
    """Wrap a method that makes a layer: beside half-precision weights it has their dtype."""

    def method(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        layer = original(self, *args, **kwargs)
        return layer.to(self.weight.dtype) if self.weight.dtype in _HALF else layer

    return method


def _keeping_half_precision(original: Method) -> Method:
    """Wrap extended_forward: gromo's scales are float32 and make float32 of what half-precision layers read next."""

    def extended_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype not in _HALF:
            return original(self, x, *args, **kwargs)
        with torch.autocast(x.device.type, x.dtype):
            out = original(self, x, *args, **kwargs)
        return tree_map_only(Tensor, lambda each: each.to(x.dtype), out)

    return extended_forward


def _optimal_delta(original: Method) -> Method:
    def optimal_delta(
        tensor_s: Tensor,
        tensor_m: Tensor,
        dtype: torch.dtype = torch.float32,
        force_pseudo_inverse: bool = False,
        tensor_covariance_loss_gradient: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not force_pseudo_inverse:
            try:
                return updates.delta(tensor_s, tensor_m, dtype, tensor_covariance_loss_gradient)
            except NotCovered:
                pass
        return original(tensor_s, tensor_m, dtype, force_pseudo_inverse, tensor_covariance_loss_gradient)

    return optimal_delta


def _compute_optimal_added_parameters(original: Method) -> Method:
    def compute_optimal_added_parameters(
        matrix_s: Tensor | None,
        matrix_n: Tensor,
        numerical_threshold: float = 1e-6,
        statistical_threshold: float = 1e-3,
        maximum_added_neurons: int | None = None,
        alpha_zero: bool = False,
        omega_zero: bool = False,
        ignore_singular_values: bool = False,
        matrix_covariance_loss_gradient: Tensor | None = None,
        e_numerical_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        threshold = numerical_threshold if e_numerical_threshold is None else e_numerical_threshold
        try:
            alpha, omega, values = updates.added_parameters(
                matrix_s,
                matrix_n,
                numerical_threshold,
                statistical_threshold,
                maximum_added_neurons,
                ignore_singular_values,
                matrix_covariance_loss_gradient,
                threshold,
            )
        except NotCovered:
            return original(
                matrix_s,
                matrix_n,
                numerical_threshold,
                statistical_threshold,
                maximum_added_neurons,
                alpha_zero,
                omega_zero,
                ignore_singular_values,
                matrix_covariance_loss_gradient,
                e_numerical_threshold,
            )
        alpha = torch.zeros_like(alpha) if alpha_zero else alpha
        omega = torch.zeros_like(omega) if omega_zero else omega
        return alpha, omega, values

    return compute_optimal_added_parameters
