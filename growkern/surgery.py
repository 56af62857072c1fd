"""APPLY new neurons: widen layers, norms and optimizer state in step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from growkern.arguments import check_instance, check_optimizer
from growkern.neurons import METHODS, NewNeurons
from growkern.sites import Layers, resolve


def apply(
    model: nn.Module,
    new: NewNeurons,
    *,
    scale: float = 1.0,
    update: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Add new neurons to a model, in place: (√γ α, √γ ω) for a scale γ ≥ 0, (√|γ| α, −√|γ| ω) below.

    Layers get new, larger Parameters, whose leading entries are the old ones. The optimizer's state grows with
    them: old entries are kept, new ones are zero. A norm between the layers hands on the new units'
    pre-activations as they are in evaluation mode (GroupNorm: on average, as it normalises each sample by itself).
    A norm undoes the scale of a fan-in: new units ahead of one take the mean norm of the existing fan-ins and, where
    the activation is positively homogeneous, the mean size of the norm's weights. ω makes up for the latter.

    Parameters
    ----------
    model : nn.Module
        The model that `new` was solved for.
    new : NewNeurons
        What `solve` found.
    scale : float
        γ, the amplitude. At 0 the model's function is what it was.
    update : bool
        Also add γ·dW* to the consumer's existing weights.
    optimizer : torch.optim.Optimizer, optional
        Its parameter groups and state follow.

    Raises
    ------
    ValueError
        If `new` does not fit the model any more, or the optimizer holds state that is not per parameter entry.
        Nothing has been changed then.
    """
    check_instance("new", new, NewNeurons)
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    with torch.inference_mode(False):  # a Parameter made in that mode could never be trained
        plan = _plan(model, new, scale, update)
        if optimizer is not None:
            check_optimizer(optimizer, model, {module._parameters.get(name) for module, name, _ in plan.tensors})
        plan.commit(optimizer)


@contextmanager
def trial(model: nn.Module, new: NewNeurons, *, scale: float, update: bool = False) -> Iterator[None]:
    """Apply new neurons for the duration of a with block; the old Parameters, untouched, come back after."""
    plan = _plan(model, new, scale, update)
    modules = {module: None for module, *_ in (*plan.tensors, *plan.attributes)}
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in modules]
    attributes = [(module, name, getattr(module, name)) for module, name, _ in plan.attributes]
    try:
        plan.commit(None)
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, name, value in attributes:
            setattr(module, name, value)


@dataclass
class _Plan:
    """Everything that an application will set, made before anything is."""

    tensors: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, int]] = field(default_factory=list)

    def commit(self, optimizer: torch.optim.Optimizer | None) -> None:
        replaced = {}
        for module, name, value in self.tensors:
            old = module._parameters.get(name)
            if old is not None:
                new = nn.Parameter(value, requires_grad=old.requires_grad)
                new.__dict__.update(old.__dict__)
                new._backward_hooks = old._backward_hooks  # the user's hooks, whose handles can still remove them
                new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
                new.grad = None if old.grad is None else _widened(old.grad, value)
                replaced[old] = new
        states = {} if optimizer is None else _states(optimizer, replaced)
        groups = [] if optimizer is None else optimizer.param_groups
        regrouped = [(group, [replaced.get(p, p) for p in group["params"]]) for group in groups]
        for module, name, value in self.tensors:
            if (old := module._parameters.get(name)) is not None:
                module._parameters[name] = replaced[old]
            else:
                module._buffers[name] = value
        for module, name, size in self.attributes:
            setattr(module, name, size)
        for group, parameters in regrouped:
            group["params"] = parameters
        for old, state in states.items():
            del optimizer.state[old]  # type: ignore[union-attr]
            optimizer.state[replaced[old]] = state  # type: ignore[union-attr]


@torch.no_grad()
def _plan(model: nn.Module, new: NewNeurons, scale: float, update: bool) -> _Plan:
    layers, plan, count = resolve(model, new.site), _Plan(), len(new)
    _check_fit(layers, new)
    producer, consumer, norm, units = layers.producer, layers.consumer, layers.between.norm, layers.units
    size = math.sqrt(abs(scale))
    alpha, omega = size * new.alpha, math.copysign(size, scale) * new.omega

    if norm is not None:
        alpha, omega = _plan_norm(plan, layers, new, alpha, omega, size)
    weight = alpha if producer.bias is None else alpha[:, :-1]
    fan_in = weight.reshape(-1, *producer.weight.shape[1:])
    plan.tensors.append((producer, "weight", _extended(producer.weight, fan_in)))
    if producer.bias is not None:
        plan.tensors.append((producer, "bias", _extended(producer.bias, alpha[:, -1])))

    old = consumer.weight
    if update:
        delta = scale * new.best_update
        if consumer.bias is not None:
            moved = consumer.bias + delta[:, -1].to(consumer.bias)
            plan.tensors.append((consumer, "bias", moved))
            delta = delta[:, :-1]
        old = old + delta.reshape(old.shape).to(old)
    plan.tensors.append((consumer, "weight", _extended(old, _fan_out(layers, new.kernel, omega, count), dim=1)))

    writes = "out_channels" if isinstance(producer, nn.Conv2d) else "out_features"
    reads = "in_channels" if isinstance(consumer, nn.Conv2d) else "in_features"
    plan.attributes += [(producer, writes, units + count), (consumer, reads, plan.tensors[-1][2].shape[1])]
    return plan


def _plan_norm(
    plan: _Plan, layers: Layers, new: NewNeurons, alpha: Tensor, omega: Tensor, size: float
) -> tuple[Tensor, Tensor]:
    """Plan a norm that undoes itself for new units; return α and ω at the scale of the existing ones."""
    if new.mean is None or new.variance is None:
        raise ValueError(f"new: solved for {new.site.name} without the norm that is there now; measure and solve again")
    norm: Any = layers.between.norm
    mean, variance = size * new.mean, size**2 * new.variance
    rows, group = layers.producer.weight.detach().flatten(1), layers.between.multiple
    born = alpha[:, : rows.shape[1]].norm(dim=1).unflatten(0, (-1, group)).mean(1).repeat_interleave(group)
    factor = _ratio(rows.norm(dim=1).mean(), born, new)
    if isinstance(norm, nn.GroupNorm):  # which divides by the deviation of a whole group
        second = (variance + mean.square()).unflatten(0, (-1, group)).mean(1)
        mean = mean.unflatten(0, (-1, group)).mean(1)
        variance = (second - mean.square()).repeat_interleave(group)
        mean = mean.repeat_interleave(group)
    undo = ((factor.square() * variance).to(norm.weight) + norm.eps).sqrt() / factor.to(norm.weight)
    rest = _ratio(norm.weight.detach().abs().mean(), undo, new) if layers.between.homogeneous else torch.ones_like(undo)
    plan.tensors += [(norm, "weight", _extended(norm.weight, undo * rest))]
    plan.tensors += [(norm, "bias", _extended(norm.bias, mean.to(rest) * rest))]
    if isinstance(norm, nn.GroupNorm):
        plan.attributes += [(norm, "num_channels", norm.num_channels + len(new))]
        plan.attributes += [(norm, "num_groups", norm.num_groups + len(new) // group)]
    else:
        plan.tensors += [(norm, "running_mean", _extended(norm.running_mean, factor * mean))]
        plan.tensors += [(norm, "running_var", _extended(norm.running_var, factor.square() * variance))]
        plan.attributes += [(norm, "num_features", len(norm.running_mean) + len(new))]
    return factor[:, None] * alpha, omega / rest.to(omega)


def _ratio(existing: Tensor, born: Tensor, new: NewNeurons) -> Tensor:
    """Factor from the size of each new unit to that of existing ones; 1 where a side is meant to start at zero."""
    if METHODS[new.method].starts_at_zero != "neither":
        return torch.ones_like(born)
    return torch.where((born > 0) & (existing > 0), existing.to(born) / born, 1.0)


def _fan_out(layers: Layers, kernel: str, omega: Tensor, count: int) -> Tensor:
    """Make the new input columns of the consumer, from ω (r·offsets, K)."""
    shape = layers.consumer.weight.shape
    if kernel == "linear":
        return omega
    if layers.between.flatten:
        return omega.reshape(shape[0], shape[1] // layers.units, count).mT.flatten(1)  # (r, K·H·W)
    if kernel == "full":
        return omega.reshape(shape[0], *shape[2:], count).movedim(-1, 1)
    fan_out = omega.new_zeros(shape[0], count, *shape[2:])
    fan_out[:, :, shape[2] // 2, shape[3] // 2] = omega
    return fan_out


def _check_fit(layers: Layers, new: NewNeurons) -> None:
    producer, consumer = layers.producer, layers.consumer
    fan_in = producer.weight[0].numel() + (producer.bias is not None)
    fan_out = consumer.weight.numel() // layers.units
    reads = consumer.weight[0].numel() + (consumer.bias is not None)
    offsets = math.prod(consumer.weight.shape[2:]) if new.kernel == "center" else 1
    for what, name, solved, now in (
        ("a fan-in", new.site.producer, new.alpha.shape[1], fan_in),
        ("a fan-out", new.site.consumer, new.omega.shape[0] * offsets, fan_out),
        ("updates", new.site.consumer, new.best_update.shape[1], reads),
    ):
        if solved != now:
            raise ValueError(f"new: solved for {what} of {solved}, but {name} now has {now}; measure and solve again")
    if len(new) % layers.between.multiple:
        raise ValueError(f"new: {new.site.name} grows by multiples of {layers.between.multiple} units, got {len(new)}")


def _extended(old: Tensor, extra: Tensor, dim: int = 0) -> Tensor:
    """Old and new entries along a dimension, in the old dtype, device and memory format."""
    channels_last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    joined = torch.cat([old.detach(), extra.to(old)], dim)
    return joined.contiguous(memory_format=torch.channels_last) if channels_last else joined.contiguous()


def _widened(old: Tensor, like: Tensor) -> Tensor:
    """Old entries in the leading corner of zeros, in the shape and memory format of a parameter."""
    new = torch.zeros_like(like, dtype=old.dtype, device=old.device)
    new[tuple(slice(size) for size in old.shape)] = old
    return new


def _states(optimizer: torch.optim.Optimizer, replaced: dict[Any, nn.Parameter]) -> dict[Any, dict[str, Any]]:
    """State of the replaced parameters at their new shapes."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS keeps one flat history, which cannot grow; pass None and make it anew after")
    states = {}
    for old in [parameter for parameter in replaced if parameter in optimizer.state]:
        state = dict(optimizer.state[old])
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                state[name] = _widened(value, replaced[old])
            elif isinstance(value, Tensor) and value.numel() > 1:
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} keeps {name!r} of shape {tuple(value.shape)} for a "
                    f"parameter of shape {tuple(old.shape)}, which cannot grow; pass None and make it anew after"
                )
        states[old] = state
    return states
