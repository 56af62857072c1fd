"""Checks of arguments that several functions take, with one form of message."""

from __future__ import annotations

from collections.abc import Iterable

KERNELS = ("full", "center")
REDUCTIONS = ("mean", "sum")


def check_choice(name: str, value: object, accepted: Iterable[str]) -> None:
    """Raise a ValueError if a value is none of the accepted ones."""
    if value not in (accepted := tuple(accepted)):
        raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}")


def check_count(name: str, value: object, also: str | None = None) -> None:
    """Raise a ValueError if a value is neither an integer of 0 or more nor what is also accepted."""
    if value != also and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        alternative = "" if also is None else f"{also!r} or "
        raise ValueError(f"{name}: expected {alternative}an integer of 0 or more, got {value!r}")


def check_share(name: str, value: object) -> None:
    """Raise a ValueError if a value is not a number from 0 to 1."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value!r}")
