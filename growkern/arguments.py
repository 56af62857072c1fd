"""Checks of arguments that several functions take, with one form of message."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from numbers import Integral
from typing import Any

from torch import nn
from torch.optim import Optimizer


def check_choice(name: str, value: object, accepted: Iterable[str]) -> None:
    """Raise a ValueError if a value is none of the accepted ones."""
    if value not in (accepted := tuple(accepted)):
        raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}")


def check_count(name: str, value: object, also: str | None = None) -> None:
    """Raise a ValueError if a value is neither an integer of 0 or more nor what is also accepted."""
    if value != also and (not isinstance(value, Integral) or isinstance(value, bool) or value < 0):
        alternative = "" if also is None else f"{also!r} or "
        raise ValueError(f"{name}: expected {alternative}an integer of 0 or more, got {value!r}")


def check_collected(kernel: object, reduction: object, null_draws: object) -> None:
    """Raise a ValueError for options of `collect` that are none."""
    check_choice("kernel", kernel, ("full", "center"))
    check_choice("reduction", reduction, ("mean", "sum"))
    check_draws(null_draws)


def check_draws(value: Any, needed: bool = False) -> None:
    """Raise a ValueError for one draw of chance, which tells nothing of it, and for none where they are needed."""
    check_count("null_draws", value)
    if value == 1 or (needed and not value):
        raise ValueError(
            f"null_draws: 'auto' needs draws of chance, two at least, got {value}; "
            "use collect(..., null_draws=16), or 0 and an integer for neurons"
        )


def check_share(name: str, value: object) -> None:
    """Raise a ValueError if a value is not a number from 0 to 1."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value!r}")


def check_instance(name: str, value: object, kind: type, accepted: str | None = None) -> None:
    """Raise a ValueError if a value is not an instance of a class; it says what is accepted."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {accepted or kind.__name__}, got {_kind(value)}")


def check_trained(model: object, loss_fn: object, optimizer: object = None) -> None:
    """Raise a ValueError if a model, its loss function or its optimizer, where there is one, is something else."""
    check_instance("model", model, nn.Module)
    if not callable(loss_fn) or isinstance(loss_fn, type):
        raise ValueError(f"loss_fn: expected a function of (model(input), target), got {_kind(loss_fn)}")
    if optimizer is not None:
        check_instance("optimizer", optimizer, Optimizer)


def check_optimizer(optimizer: Any, model: nn.Module, changed: Collection[Any]) -> None:
    """Raise a ValueError for what does not train a model; warn of changed parameters that it does not hold."""
    check_instance("optimizer", optimizer, Optimizer)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise ValueError("optimizer: it holds none of the model's parameters")
    if lost := [name for name, p in model.named_parameters() if p in changed and p.requires_grad and p not in held]:
        warnings.warn(
            f"optimizer: it does not hold {', '.join(lost)}, which larger ones replace: another optimizer with them "
            "has to be made anew; requires_grad_(False) says that there is none",
            stacklevel=3,
        )


def listed(name: str, values: Any, accepted: str) -> list[Any]:
    """Make a list of what can be iterated over; anything else is a ValueError that says what is accepted."""
    try:
        iterator = iter(values)
    except TypeError:
        raise ValueError(f"{name}: expected {accepted}, got {_kind(values)}") from None
    return list(iterator)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
