"""Batches as users have them: pairs of input and target, whose tensors may be nested, and where a model wants them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def pair(batch: Any, name: str = "batches") -> tuple[Any, Any]:
    """Input and target of a batch; what is no pair is a ValueError that names the argument it came in."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            f"{name}: expected (input, target) pairs, where a tuple holds several inputs, got "
            f"{type(batch).__name__}{count}"
        )
    return batch[0], batch[1]


def to_device(batch: Any, device: torch.device, name: str = "batches") -> tuple[tuple[Any, ...], Any]:
    """Arguments of the model, and the target, of one (input, target) pair, on a device; see `pair`."""
    args, target = (_moved(part, device) for part in pair(batch, name))
    return tuple(args) if isinstance(args, tuple | list) else (args,), target


def leaves(value: Any) -> Iterator[Tensor]:
    """Tensors with a batch dimension, also those in tuples, lists and dicts."""
    if isinstance(value, Tensor) and value.dim():
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(each)


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's first parameter; a model without any, or without values, is a ValueError."""
    for parameter in model.parameters():
        if parameter.is_meta:
            raise ValueError("model: its parameters are on the meta device and have no values to grow from")
        return parameter.device
    raise ValueError(f"model: {type(model).__name__} has no parameters, so nothing in it can grow")


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors on a device, also those in tuples, lists and dicts, and what else has a method `to`."""
    if isinstance(value, Tensor):
        value = value.clone() if value.is_inference() else value  # those of inference mode take part in no graph
        return value.to(device, non_blocking=True)
    if callable(getattr(value, "to", None)):
        return value.to(device)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _moved(each, device) for key, each in value.items()})
        return copied
    if not isinstance(value, tuple | list):
        return value
    parts = [_moved(each, device) for each in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
