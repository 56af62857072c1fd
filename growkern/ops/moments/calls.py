"""Calls of the moments as values, so that those of several sites can be made together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from growkern.ops.moments.checks import (
    conv2d_moments_shapes,
    conv2d_residual_shapes,
    linear_moments_shapes,
    linear_residual_shapes,
)
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan, conv2d_plan, linear_plan, residual_plan
from growkern.ops.moments.rows import read_by

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Shapes = tuple[tuple[int, int, int], tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]


class Call(NamedTuple):
    """One call of `linear_moments`, or with geometries of `conv2d_moments`."""

    x: Tensor
    h: Tensor
    v: Tensor
    producer: ConvGeometry | None = None
    consumer: ConvGeometry | None = None
    kernel: str = "full"
    x_bias: bool = False
    h_bias: bool = False
    precision: str = "ieee"

    @property
    def full(self) -> bool:
        """Whether there is no xh."""
        return self.producer is not None and self.kernel == "full"

    def facts(self) -> tuple[Any, ...]:
        """Give all that `check` and a layout depend on, as a key; the arguments need not be right yet."""
        return *map(_facts, self[:3]), *self[3:]

    def check(self) -> None:
        """Raise what the op would for these arguments."""
        x, h, v, _, _, kernel, x_bias, h_bias, precision = self
        _check_tensors(x=x, h=h, v=v)
        if (geometries := self.geometries()) is None:
            linear_moments_shapes(x, h, v, x_bias, h_bias, precision)
        else:
            conv2d_moments_shapes(x, h, v, *geometries, kernel, x_bias, h_bias, precision)

    def geometries(self) -> tuple[list[int], list[int]] | None:
        """Pack both geometries; None for matrices."""
        if self.producer is None or self.consumer is None:
            return None
        return packed("producer", self.producer), packed("consumer", self.consumer)

    def plan(self) -> Plan:
        """Plan the moments."""
        if self.producer is None or self.consumer is None:
            return linear_plan((self.x.shape[1], self.h.shape[1], self.v.shape[1]), self.x_bias, self.h_bias)
        shapes = shapes_of(self.x, self.h, self.v)
        return conv2d_plan(*shapes, self.producer, self.consumer, self.full, self.x_bias, self.h_bias)

    def is_uniform_of(self, other: Call) -> bool:
        """Whether this asks for the moment of the other's x and ones alone, over all positions of the hidden map."""
        nothing = not (self.h.shape[1] or self.v.shape[1] or self.h_bias) and self.x_bias and self.full
        alike = self.x is other.x and self.producer == other.producer and self.h.shape[2:] == other.h.shape[2:]
        return nothing and alike and self.consumer == ConvGeometry(1)

    def tensors(self) -> tuple[Tensor, ...]:
        """Give x, h and v as they are."""
        return self[:3]

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give x, h and v, with the taps of h as channels where the consumer has one output."""
        h = self.h if self.consumer is None else read_by(self.consumer, self.h, self.v)
        return self.x, h, self.v

    def six(self, results: list[Tensor]) -> Six:
        """Name the results of the plan, and give an empty xh where it has none."""
        if self.full:
            results.insert(1, results[0].new_empty(len(results[0]), 0))
        xx, xh, xv, hh, hv, vv = results
        return xx, xh, xv, hh, hv, vv


class Residual(NamedTuple):
    """One call of `linear_residual`, or with geometries of `conv2d_residual`, on the operands of a `Call`."""

    call: Call
    update: Tensor
    signs: Tensor | None = None
    rows_per_sign: int = 1  # images have a sign each

    @property
    def draws(self) -> int:
        """Count the draws of signs."""
        return 0 if self.signs is None else len(self.signs)

    @property
    def x(self) -> Tensor:
        """The x of the operands."""
        return self.call.x

    def facts(self) -> tuple[Any, ...]:
        """Give all that `check` and a layout depend on, as a key; the arguments need not be right yet."""
        return *self.call.facts(), *map(_facts, self[1:3]), self.rows_per_sign

    def tensors(self) -> tuple[Tensor, ...]:
        """Give x, h, v, the update, and rows of float32 signs if there are any: of runs, or of all to multiply in."""
        given = *self.call[:3], self.update
        if self.signs is None:
            return given
        signs = self.signs.to(torch.float32)
        if self.rows_per_sign > 1 and not self.apart():
            signs = signs.repeat_interleave(self.rows_per_sign, 1)[:, : len(self.call.x)]
        return *given, signs.contiguous()

    def check(self) -> None:
        """Raise what the op would for these arguments."""
        x, h, v, _, _, kernel, x_bias, h_bias, precision = self.call
        _check_tensors(x=x, h=h, v=v, update=self.update, **({} if self.signs is None else {"signs": self.signs}))
        if (geometries := self.call.geometries()) is None:
            linear_residual_shapes(x, h, v, *self[1:], x_bias, h_bias, precision)
        else:
            conv2d_residual_shapes(x, h, v, self.update, *geometries, kernel, self.signs, x_bias, h_bias, precision)

    def plan(self) -> Plan:
        """Plan the products of x and h with v⊥."""
        call, one = self.call, ConvGeometry(1)
        flags = call.full, call.x_bias, call.h_bias
        if call.producer is None or call.consumer is None:
            channels = call.x.shape[1], call.h.shape[1], call.v.shape[1]
            return residual_plan(channels, ((1, 1),) * 3, one, one, *flags)
        return residual_plan(*shapes_of(*call[:3]), call.producer, call.consumer, *flags)

    def apart(self) -> bool:
        """Whether to sum rows that share a sign once and combine these sums, which costs less than a sum a draw."""
        hidden = self.call.h.shape[2:].numel()
        return self.draws > 0 and self.rows_per_sign * hidden > 1 + self.draws


def packed(name: str, geometry: ConvGeometry) -> list[int]:
    """Write a geometry as the ``int[]`` of an op's schema; anything else is a TypeError."""
    if not isinstance(geometry, ConvGeometry):
        raise TypeError(f"{name}: expected a ConvGeometry, got {type(geometry).__name__}")
    return geometry.pack()


def shapes_of(x: Tensor, h: Tensor, v: Tensor) -> Shapes:
    """Channels and sizes of maps."""
    return (x.shape[1], h.shape[1], v.shape[1]), (_size(x), _size(h), _size(v))


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _facts(value: Any) -> Any:
    """Give what a layout depends on of a tensor; anything else stays as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % 16


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]
