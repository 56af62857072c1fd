"""Triton kernels of the second moments, and their launchers: the engine of `gpu`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from growkern.backend import INTERPRETED
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.gpu import Rows, alignment
from growkern.ops.moments.plan import Plan
from growkern.ops.moments.schedule import (
    ASSEMBLE_COLUMNS,
    ASSEMBLE_ROWS,
    FIELDS,
    REGION_FIELDS,
    SUM_BLOCK,
    Schedule,
    Tiles,
)

CHAIN = 512  # positions that tensor cores may add up before the sum goes to float32 registers


@triton.jit
def _pick(index, x, h, v, ones):
    chosen = ones
    if index == 0:
        chosen = x
    if index == 1:
        chosen = h
    if index == 2:
        chosen = v
    return chosen


@triton.jit
def _rows(pointer, pixel, pitch, channel, channels, valid):
    """Load a tile of activations, (positions, channels), with zeros outside."""
    mask = valid[:, None] & (channel < channels)[None, :]
    return tl.load(pointer + pixel[:, None] * pitch + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _columns(pointer, pixel, pitch, channel, channels, valid):
    """Load the same as (channels, positions): with `tl.trans` Triton would copy 4 bytes at a time, not 16."""
    mask = valid[None, :] & (channel < channels)[:, None]
    return tl.load(pointer + pixel[None, :] * pitch + channel[:, None], mask=mask, other=0.0)


@triton.jit
def correlate_kernel(
    ux, uh, uv, u_ones, vx, vh, vv, v_ones,
    x_pitch, h_pitch, v_pitch, x_channels, h_channels, v_channels,
    out, products, items, signs, samples,
    ALIGN: tl.constexpr, MATRIX: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr, CHAIN: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum u(k) v(k)ᵀ over k for one tile of a product over one range of positions."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    item = items + 4 * tl.program_id(0)
    product = products + tl.load(item) * FIELDS
    tile_m, tile_n, split = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    u, v = tl.load(product), tl.load(product + 1)
    m_size, n_size = tl.load(product + 2).to(tl.int32), tl.load(product + 3).to(tl.int32)
    area, columns = tl.load(product + 4).to(index), tl.load(product + 5).to(index)
    length = tl.load(product + 7).to(index)
    first = split.to(index) * length
    last = tl.minimum(tl.load(product + 6).to(index), first + length)
    u_base, u_row = tl.load(product + 10).to(index), tl.load(product + 11).to(index)
    u_column, u_pixels = tl.load(product + 12).to(index), tl.load(product + 13).to(index)
    v_base, v_row = tl.load(product + 14).to(index), tl.load(product + 15).to(index)
    v_column, v_pixels = tl.load(product + 16).to(index), tl.load(product + 17).to(index)
    sign = signs + tl.load(product + 18) * samples

    u_pointer, v_pointer = _pick(u, ux, uh, uv, u_ones), _pick(v, vx, vh, vv, v_ones)
    # Pitches and channels come in units of ALIGN, so that the compiler knows which loads are 16 bytes wide.
    u_pitch = _pick(u, x_pitch, h_pitch, v_pitch, 1).to(index) * ALIGN
    v_pitch = _pick(v, x_pitch, h_pitch, v_pitch, 1).to(index) * ALIGN
    u_channels = _pick(u, x_channels, h_channels, v_channels, 1) * ALIGN
    v_channels = _pick(v, x_channels, h_channels, v_channels, 1) * ALIGN

    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Tensor cores drop low bits when they add up: sums restart after every chain.
    reach = BLOCK_K * CHAIN if CHAIN else last - first
    for chain in range(first, last, reach):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(chain, tl.minimum(last, chain + reach), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            valid = k < last
            if MATRIX:
                image = k
                u_pixel, v_pixel = u_base + k * u_pixels, v_base + k * v_pixels
            else:
                image = k // area
                rest = k - image * area
                row = rest // columns
                column = rest - row * columns
                u_pixel = u_base + image * u_pixels + row * u_row + column * u_column
                v_pixel = v_base + image * v_pixels + row * v_row + column * v_column
            a = _columns(u_pointer, u_pixel, u_pitch, m, u_channels, valid).to(OPERAND)
            b = _rows(v_pointer, v_pixel, v_pitch, n, v_channels, valid).to(OPERAND)
            if SIGNED:
                b *= tl.load(sign + image, mask=valid, other=0.0)[:, None].to(OPERAND)
            if PRECISION == "tf32" and OPERAND == tl.float32:
                # Tensor cores take float32 along positions only. Through registers the tiles are turned in shared
                # memory; straight into it they would come 4 bytes at a time.
                a += 0.0
                b += 0.0
            if CHAIN:
                part = tl.dot(a, b, part, input_precision=PRECISION)
            else:
                total = tl.dot(a, b, total, input_precision=PRECISION)
        total += part

    target = out + tl.load(product + 8) + split.to(tl.int64) * tl.load(product + 9)
    inside = (m < m_size)[:, None] & (n < n_size)[None, :]
    tl.store(target + m.to(tl.int64)[:, None] * n_size + n[None, :], total, mask=inside)
    if (tl.load(product + 19) != 0) & (tile_m != tile_n):  # a symmetric product has no tiles below the diagonal
        below = (n < n_size)[:, None] & (m < m_size)[None, :]
        tl.store(target + n.to(tl.int64)[:, None] * n_size + m[None, :], tl.trans(total), mask=below)


@triton.jit
def reduce_kernel(buffer, sums, BLOCK: tl.constexpr):
    """Add up the splits of a product, always in the same order."""
    task = sums + 5 * tl.program_id(0)
    source, target, size = tl.load(task), tl.load(task + 1), tl.load(task + 2)
    splits, chunk = tl.load(task + 3), tl.load(task + 4)
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(buffer + source + split * size + element, mask=element < size, other=0.0)
    tl.store(buffer + target + element, total, mask=element < size)


@triton.jit
def assemble_kernel(
    slots, slots_size, out0, out1, out2, out3, out4, out5, regions, starts, terms, weights, count,
    FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of a region of a result: every element is a weighted sum over the terms of its pair of taps."""
    program, draw = tl.program_id(0), tl.program_id(1).to(tl.int64)
    region = regions
    for number in range(1, count):
        candidate = regions + number * FIELDS
        region = tl.where(tl.load(candidate) <= program, candidate, region)
    tile = program - tl.load(region)
    result, corner, pitch = tl.load(region + 1), tl.load(region + 2), tl.load(region + 3)
    height, u_taps = tl.load(region + 4), tl.load(region + 5)
    width, v_taps = tl.load(region + 6), tl.load(region + 7)
    first_block, most = tl.load(region + 8), tl.load(region + 9)
    across = tl.cdiv(width, COLUMNS)
    i = tile // across * ROWS + tl.arange(0, ROWS)
    j = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < height)[:, None] & (j < width)[None, :]
    block = first_block + (i % u_taps)[:, None] * v_taps + (j % v_taps)[None, :]
    channel_u, channel_v = (i // u_taps)[:, None], (j // v_taps)[None, :]
    begin = tl.load(starts + block, mask=inside, other=0)
    end = tl.load(starts + block + 1, mask=inside, other=0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for number in range(most):
        term = begin + number
        live = term < end
        slot = tl.load(terms + 3 * term, mask=live, other=0)
        u_step = tl.load(terms + 3 * term + 1, mask=live, other=0)
        v_step = tl.load(terms + 3 * term + 2, mask=live, other=0)
        weight = tl.load(weights + term, mask=live, other=0.0)
        address = slots + draw * slots_size + slot + channel_u * u_step + channel_v * v_step
        total += weight * tl.load(address, mask=live, other=0.0)
    target = _result(result, out0, out1, out2, out3, out4, out5) + draw * tl.load(region + 10) + corner
    tl.store(target + i.to(tl.int64)[:, None] * pitch + j[None, :], total, mask=inside)


@triton.jit
def _result(index, out0, out1, out2, out3, out4, out5):
    chosen = out0
    if index == 1:
        chosen = out1
    if index == 2:
        chosen = out2
    if index == 3:
        chosen = out3
    if index == 4:
        chosen = out4
    if index == 5:
        chosen = out5
    return chosen


@triton.jit
def subtract_kernel(
    h, h_pitch, v, v_pitch, weight, bias, out, out_pitch,
    positions, area, columns, channels, targets, map_rows, map_columns,
    kernel_columns, row_stride, column_stride, row_padding, column_padding, row_step, column_step, taps,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Form v − (weights ∗ h + bias) at a tile of positions and channels of v."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    across = tl.cdiv(targets, BLOCK_N)
    position = (tl.program_id(0) // across).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = position < positions
    image = position // area
    rest = position - image * area
    row = rest // columns
    column = rest - row * columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h_channels = channels * ALIGN
    for tap in range(taps):
        y = row * row_stride - row_padding + tap // kernel_columns * row_step
        x = column * column_stride - column_padding + tap % kernel_columns * column_step
        read = valid & (y >= 0) & (y < map_rows) & (x >= 0) & (x < map_columns)
        pixel = (image * map_rows + y) * map_columns + x
        for start in range(0, h_channels, BLOCK_K):
            channel = start + tl.arange(0, BLOCK_K)
            a = _rows(h, pixel, (h_pitch * ALIGN).to(index), channel, h_channels, read)
            w_mask = (channel < h_channels)[:, None] & (target < targets)[None, :]
            w_row = (tap * h_channels + channel)[:, None] * targets
            w = tl.load(weight + w_row + target[None, :], mask=w_mask, other=0.0)
            total = tl.dot(a.to(w.dtype), w, total, input_precision=PRECISION)
    mask = valid[:, None] & (target < targets)[None, :]
    v_pointer = v + position[:, None] * (v_pitch * ALIGN).to(index) + target[None, :]
    left = tl.load(v_pointer, mask=mask, other=0.0).to(tl.float32)
    left -= tl.load(bias + target, mask=target < targets, other=0.0)[None, :]
    tl.store(out + position[:, None] * (out_pitch * ALIGN).to(index) + target[None, :], left - total, mask=mask)


def tiles(plan: Plan, dtype: torch.dtype, precision: str, device: torch.device) -> Tiles:
    """Choose the tiles by the widest source."""
    widest, half = max(plan.channels), dtype != torch.float32
    if widest <= 16:
        return Tiles(16, 16, 64 if half else 32, 1)
    if widest <= 32:
        return Tiles(32, 32, 64 if half else 32, 2)
    if widest < 128 or (precision == "ieee" and not half):
        return Tiles(64, 64, 64 if half else 32, 4)
    return Tiles(128, 128, 64, 8, programs=2) if half else Tiles(128, 64, 32, 8, programs=4)


def correlate(
    us: Sequence[Rows], vs: Sequence[Rows], out: Tensor, plan: Schedule, precision: str, signs: Tensor | None
) -> None:
    """Launch one program for every item of the schedule."""
    if not len(plan.items):
        return
    (x, h, *_), align, tiles = us, alignment(*us, *vs), plan.tiles
    half = vs[2].data.itemsize == 2
    correlate_kernel[(len(plan.items),)](
        *(each.data for each in (*us, *vs)),
        *(each.pitch // align for each in (x, h, vs[2])),
        *(each.channels // align for each in (x, h, vs[2])),
        out,
        plan.products,
        plan.items,
        out if signs is None else signs,
        0 if signs is None else signs.shape[1],
        ALIGN=align,
        MATRIX=x.data.ndim == 2,
        WIDE=_wide(*us, *vs),
        SIGNED=signs is not None,
        PRECISION=_precision(precision, half),
        OPERAND=_operand(x.data.dtype, vs[2].data.dtype),
        CHAIN=CHAIN // tiles.block_k if half else 0,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        FIELDS=FIELDS,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def reduce(workspace: Tensor, plan: Schedule) -> None:
    """Launch one program for every chunk of every product that was split."""
    if len(plan.sums):
        reduce_kernel[(len(plan.sums),)](workspace, plan.sums, BLOCK=SUM_BLOCK)


def assemble(slots: Tensor, plan: Schedule, results: Sequence[Tensor]) -> None:
    """Launch one program for every tile of every region and draw."""
    if not plan.programs or not len(slots):
        return
    targets = [*results, *[results[0]] * (6 - len(results))]
    assemble_kernel[(plan.programs, len(slots))](
        slots,
        slots.stride(0),
        *targets,
        plan.regions,
        plan.starts,
        plan.terms,
        plan.weights,
        len(plan.regions),
        FIELDS=REGION_FIELDS,
        ROWS=ASSEMBLE_ROWS,
        COLUMNS=ASSEMBLE_COLUMNS,
    )


def subtract(h: Rows, v: Rows, weight: Tensor, bias: Tensor, out: Rows, consumer: ConvGeometry, precision: str) -> None:
    """Launch one program for every tile of positions and channels of v."""
    targets, positions = weight.shape[2], v.data.shape[:-1].numel()
    if not targets:
        return
    rows, columns = v.data.shape[1:3] if v.data.ndim == 4 else (1, 1)
    map_rows, map_columns = h.data.shape[1:3] if h.data.ndim == 4 else (1, 1)
    align = alignment(h, v, out)
    block = 16 if targets <= 16 else 32 if targets <= 32 else 64
    subtract_kernel[(triton.cdiv(positions, 64) * triton.cdiv(targets, block),)](
        h.data,
        h.pitch // align,
        v.data,
        v.pitch // align,
        weight,
        bias,
        out.data,
        out.pitch // align,
        positions,
        rows * columns,
        columns,
        h.channels // align,
        targets,
        map_rows,
        map_columns,
        consumer.kernel_size[1],
        *consumer.stride,
        *consumer.padding,
        *consumer.dilation,
        consumer.taps,
        ALIGN=align,
        WIDE=_wide(h, v, out),
        PRECISION=_precision(precision, False),
        BLOCK_M=64,
        BLOCK_N=block,
        BLOCK_K=32,
    )


def _wide(*sides: Rows) -> bool:
    """Whether an element of some side lies further than 32 bits reach."""
    return any(each.data.shape[:-1].numel() * max(1, each.pitch) >= 2**31 - 2**16 for each in sides)


def _operand(u: torch.dtype, v: torch.dtype) -> tl.dtype:
    """Choose what is multiplied: float32 where the sides differ; the interpreter has no bfloat16."""
    if u != v or u == torch.float32 or (u == torch.bfloat16 and INTERPRETED):
        return tl.float32
    return tl.bfloat16 if u == torch.bfloat16 else tl.float16


def _precision(precision: str, half: bool) -> str:
    """Three products of tf32 halves are as good as float32; AMD has no such thing, but matrix units for float32."""
    if precision == "tf32" or half:
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"
