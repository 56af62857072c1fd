"""Products of patches: of one map with another, and the cross covariance of a whole kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from growkern import ops
from growkern.backend import result_dtype
from growkern.ops import ConvGeometry

__all__ = ["cross_covariance", "patch_products"]

CHUNK = 2**22  # patch elements gathered at once
_ONE = ConvGeometry(1)


def patch_products(
    x: Tensor,
    v: Tensor,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    kernel: str,
    hidden: Sequence[int],
    bias: bool,
) -> Tensor:
    """Sum x vᵀ over images and positions and nothing else: a residual of which nothing is subtracted.

    Parameters
    ----------
    x, v : Tensor
        Maps (B, C, H, W) and (B, r, Ho, Wo), of one dtype and device.
    producer, consumer, kernel, bias
        As in `growkern.ops.conv2d_residual`, with `bias` for `x_bias`.
    hidden : sequence of int
        Rows and columns of the map between producer and consumer.

    Returns
    -------
    Tensor, shape (p, r) or (p, r·kh·kw) for "full"
        As xv of `growkern.ops.conv2d_moments`.
    """
    h, none = x.new_empty(len(x), 0, *hidden), torch.zeros(v.shape[1], 0, device=v.device)
    return ops.conv2d_residual(x, h, v, none, producer=producer, consumer=consumer, kernel=kernel, x_bias=bias)[0]


def cross_covariance(
    x: Tensor, h: Tensor, producer: ConvGeometry, consumer: ConvGeometry, x_bias: bool, h_bias: bool
) -> Tensor:
    """Sum x_i h_lᵀ over the pairs (i, l) that each tap of the consumer joins.

    With i = stride·l + dilation·a − padding for tap a, pixel i + dilation·(k − a) of h stands at tap k of h_l. At
    stride 1 the sum for taps a and k is thus one over hidden positions i that depends on k − a alone, less the i
    whose l lies outside the output.

    Parameters
    ----------
    x : Tensor, shape (B, C, H, W)
        Input map of the producer.
    h : Tensor, shape (B, Ch, Hh, Wh)
        Input map of the consumer; dtype and device as x.
    producer, consumer : ConvGeometry
        Where the two kernels read.
    x_bias, h_bias : bool
        Append a one to each patch of x, of h.

    Returns
    -------
    Tensor, shape (kh·kw, p, q)
        For each tap of the consumer, with p and q as in `growkern.ops.conv2d_moments`.
    """
    outputs = consumer.output_size(*h.shape[2:])
    if consumer.stride == (1, 1):
        sums = _from_shifts(x, h, producer, consumer, x_bias, outputs)
    else:
        sums = _from_patches(x, h, producer, consumer, x_bias, outputs)
    if not h_bias:
        return sums
    ones = x.new_ones(len(x), 1, *outputs)
    bias = patch_products(x, ones, producer, consumer, "full", h.shape[2:], x_bias)  # (p, kh·kw)
    return torch.cat([sums, bias.T.unsqueeze(2)], dim=2)


def _from_shifts(
    x: Tensor, h: Tensor, producer: ConvGeometry, consumer: ConvGeometry, bias: bool, outputs: tuple[int, int]
) -> Tensor:
    """Combine sums over all hidden positions with those over borders, (kh·kw, p, Ch·kh·kw)."""
    (kh, kw), hidden = consumer.kernel_size, h.shape[2:]
    reach = [consumer.span(axis) - 1 for axis in (0, 1)]  # from one tap to another, at most
    taken = ConvGeometry(producer.kernel_size, producer.stride, 0, producer.dilation)
    shifted = ConvGeometry((2 * kh - 1, 2 * kw - 1), 1, [2 * each for each in reach], consumer.dilation)

    @functools.cache
    def over(rows: range, columns: range) -> Tensor:
        """Σ_i x_i h_{i + shift}ᵀ over a rectangle of hidden positions: (2kh − 1, 2kw − 1, p, Ch), by shift."""
        around = [(at[0] - reach[axis], at[-1] + 1 + reach[axis]) for axis, at in enumerate((rows, columns))]
        size = len(rows), len(columns)
        sums = patch_products(_field(x, producer, rows, columns), _cut(h, *around), taken, shifted, "full", size, bias)
        # Tap t of `shifted` joins a position with the pixel reach − dilation·t further on.
        return sums.unflatten(1, (h.shape[1], *shifted.kernel_size)).permute(2, 3, 0, 1).flip(0, 1)

    p = x.shape[1] * producer.taps + bias
    sums = []
    for ay, ax in product(range(kh), range(kw)):
        total = torch.zeros(kh, kw, p, h.shape[1], dtype=result_dtype(x.dtype), device=x.device)
        row_terms = _signed(_joined(consumer, 0, ay, hidden[0], outputs[0]), hidden[0])
        column_terms = _signed(_joined(consumer, 1, ax, hidden[1], outputs[1]), hidden[1])
        for (rows, row_sign), (columns, column_sign) in product(row_terms, column_terms):
            shifts = over(rows, columns)[kh - 1 - ay : 2 * kh - 1 - ay, kw - 1 - ax : 2 * kw - 1 - ax]
            total.add_(shifts, alpha=row_sign * column_sign)
        sums.append(total.permute(2, 3, 0, 1).flatten(1))
    return torch.stack(sums)


def _from_patches(
    x: Tensor, h: Tensor, producer: ConvGeometry, consumer: ConvGeometry, bias: bool, outputs: tuple[int, int]
) -> Tensor:
    """Gather the consumer's patches of a few images at a time, (kh·kw, p, Ch·kh·kw)."""
    hidden, taps = h.shape[2:], list(product(*(range(k) for k in consumer.kernel_size)))
    strides = [producer.stride[axis] * consumer.stride[axis] for axis in (0, 1)]
    taken = ConvGeometry(producer.kernel_size, strides, 0, producer.dilation)
    p, q = x.shape[1] * producer.taps + bias, h.shape[1] * consumer.taps
    sums = torch.zeros(consumer.taps, p, q, dtype=result_dtype(x.dtype), device=x.device)
    step = max(1, CHUNK // max(1, q * outputs[0] * outputs[1]))
    for start in range(0, len(x), step):
        images = slice(start, start + step)
        patches = F.unfold(h[images], consumer.kernel_size, consumer.dilation, consumer.padding, consumer.stride)
        patches = patches.unflatten(2, outputs)  # (images, q, Ho, Wo)
        for each, sum_ in zip(taps, sums, strict=True):
            rows, columns = (_joined(consumer, axis, each[axis], hidden[axis], outputs[axis]) for axis in (0, 1))
            if rows and columns:
                read = patches[:, :, _outputs(consumer, 0, each[0], rows), _outputs(consumer, 1, each[1], columns)]
                field = _field(x[images], producer, rows, columns)
                sum_ += patch_products(field, read, taken, _ONE, "center", read.shape[2:], bias)
    return sums


def _joined(consumer: ConvGeometry, axis: int, tap: int, hidden: int, outputs: int) -> range:
    """Hidden positions that a tap reads from some output position."""
    stride, offset = consumer.stride[axis], consumer.dilation[axis] * tap - consumer.padding[axis]
    positions = range(offset, offset + stride * outputs, stride)
    return positions[max(0, -(offset // stride)) : max(0, (hidden - 1 - offset) // stride + 1)]


def _outputs(consumer: ConvGeometry, axis: int, tap: int, positions: range) -> slice:
    """Output positions from which a tap reads the given hidden positions."""
    offset = consumer.dilation[axis] * tap - consumer.padding[axis]
    first = (positions[0] - offset) // consumer.stride[axis]
    return slice(first, first + len(positions))


def _signed(positions: range, hidden: int) -> list[tuple[range, int]]:
    """Write some neighbouring positions as all of them less those before and after."""
    if not positions:
        return []
    terms = [(range(hidden), 1), (range(positions[0]), -1), (range(positions[-1] + 1, hidden), -1)]
    return [(each, sign) for each, sign in terms if each]


def _field(x: Tensor, producer: ConvGeometry, rows: range, columns: range) -> Tensor:
    """Part of x, with its zeros, that the producer reads for a rectangle of hidden positions."""
    bounds = []
    for axis, positions in enumerate((rows, columns)):
        first, last = (at * producer.stride[axis] - producer.padding[axis] for at in (positions[0], positions[-1]))
        bounds.append((first, last + producer.span(axis)))
    return _cut(x, *bounds)


def _cut(maps: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Rows and columns from the first to before the last, zeros outside the map."""
    height, width = maps.shape[2:]
    return F.pad(maps, (-columns[0], columns[1] - width, -rows[0], rows[1] - height))
