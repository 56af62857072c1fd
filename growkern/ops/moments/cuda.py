"""Second moments by the CUDA kernels of csrc/moments: what `gpu` asks of an engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan
from growkern.ops.moments.rows import PACK_CHANNELS, PACK_PIXELS, Rows, alignment
from growkern.ops.moments.schedule import (
    ASSEMBLE_COLUMNS,
    ASSEMBLE_ROWS,
    COMBINE_BLOCK,
    COMBINE_DRAWS,
    SUM_BLOCK,
    Schedule,
    Tiles,
)

native = torch.ops.growkern_cuda


def tiles(plan: Plan, dtype: torch.dtype, precision: str, device: torch.device) -> Tiles:
    """Choose the tiles by the widest source."""
    block = _block(max(plan.channels))
    return Tiles(block, block, 32, programs={16: 14, 32: 6, 64: 3}[block])


def correlate(
    us: Sequence[Rows],
    vs: Sequence[Rows],
    out: Tensor,
    plan: Schedule,
    precision: str,
    signs: Tensor | None,
) -> None:
    """Launch one block of threads for every item of the schedule."""
    sides = (*us, *vs)
    for launch in plan.launches:
        native.correlate(
            [each.data for each in us],
            [each.data for each in vs],
            [each.pitch for each in sides],
            [each.channels for each in sides],
            _aligned(*sides),
            out,
            plan.products,
            launch.items,
            signs,
            max(launch.block_m, launch.block_n),  # a side of 16 has one tile, whatever its size
            precision == "tf32",
        )


def correlate_group(
    sources: Tensor, u: Tensor, v: Tensor, out: Tensor, plan: Schedule, precision: str, draws: Tensor | None
) -> None:
    """Do the same for several sites, from tables."""
    unit, tf32 = 16 // min(u.itemsize, v.itemsize), precision == "tf32"
    for block_m, block_n, *_, items in plan.launches:
        block = max(block_m, block_n)
        native.correlate_group(sources, draws, unit, u, v, out, plan.products, items, block, tf32)


def pack(copies: Tensor, programs: int, source: Tensor, target: Tensor) -> None:
    """Launch one block of threads for every tile of every map."""
    if programs:
        native.pack(copies, source, target, programs, PACK_PIXELS, PACK_CHANNELS)


def reduce(workspace: Tensor, plan: Schedule) -> None:
    """Launch one block of threads for every chunk of every product that was split."""
    if len(plan.sums):
        native.reduce(workspace, plan.sums, SUM_BLOCK)


def combine(workspace: Tensor, plan: Schedule, signs: Tensor, add: bool) -> None:
    """Launch one block of threads for every chunk of every product and some of the draws."""
    _combine(workspace, plan, signs, None, add)


def combine_group(workspace: Tensor, plan: Schedule, draws: Tensor) -> None:
    """Do the same for several sites, whose signs are in a table."""
    _combine(workspace, plan, None, draws, False)


def _combine(workspace: Tensor, plan: Schedule, signs: Tensor | None, drawn: Tensor | None, add: bool) -> None:
    if len(plan.sums):
        block = COMBINE_BLOCK, COMBINE_DRAWS
        native.combine(workspace, plan.sums, signs, drawn, plan.draws, plan.slots, add, *block)


def assemble(slots: Tensor, plan: Schedule, results: Sequence[Tensor]) -> None:
    """Launch one block of threads for every tile of every region and draw."""
    if len(slots):
        _assemble(slots, plan, list(results), None)


def assemble_group(slots: Tensor, plan: Schedule, results: Tensor) -> None:
    """Do the same for several sites, the addresses of whose results are in a table."""
    _assemble(slots, plan, [], results)


def _assemble(slots: Tensor, plan: Schedule, results: list[Tensor], addresses: Tensor | None) -> None:
    if plan.programs:
        tables = (plan.regions, plan.starts, plan.terms, plan.weights)
        native.assemble(slots, results, addresses, *tables, plan.programs, ASSEMBLE_ROWS, ASSEMBLE_COLUMNS)


def subtract(
    h: Rows, v: Rows, channels: int, weight: Tensor, out: Rows, consumer: ConvGeometry, precision: str
) -> None:
    """Launch one block of threads for every tile of positions and channels of v."""
    if not weight.shape[1]:
        return
    native.subtract(
        h.data,
        v.data,
        [h.pitch, v.pitch, out.pitch],
        h.channels,
        channels,
        _aligned(h),
        weight,
        out.data,
        [consumer.taps, consumer.kernel_size[1], *consumer.stride, *consumer.padding, *consumer.dilation],
        _block(weight.shape[1]),
        precision == "tf32",
    )


def subtract_tile(targets: int) -> tuple[int, int]:
    """Count the positions and channels of v that one block of threads takes."""
    return _block(targets), _block(targets)


def subtract_group(
    table: Tensor, programs: int, tile: tuple[int, int], like: Tensor, out: Tensor, align: int, precision: str
) -> None:
    """Launch one block of threads for every tile of positions and channels of every v."""
    native.subtract_group(table, programs, like, align, tile[0], precision == "tf32")


def _block(channels: int) -> int:
    return 16 if channels <= 16 else 32 if channels <= 32 else 64


def _aligned(*sides: Rows) -> bool:
    """Whether all rows can be read by 16 bytes, or 8 where they become float32."""
    return all(alignment(each) > 1 for each in sides)
