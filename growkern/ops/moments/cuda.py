"""Second moments by the CUDA kernels of csrc/moments: what `gpu` asks of an engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan
from growkern.ops.moments.rows import PACK_CHANNELS, PACK_PIXELS, Rows, alignment
from growkern.ops.moments.schedule import ASSEMBLE_COLUMNS, ASSEMBLE_ROWS, SUM_BLOCK, Schedule, Tiles

native = torch.ops.growkern_cuda


def tiles(plan: Plan, dtype: torch.dtype, precision: str, device: torch.device) -> Tiles:
    """Choose the tiles by the widest source."""
    block = _block(max(plan.channels))
    return Tiles(block, block, 32)


def correlate(
    us: Sequence[Rows], vs: Sequence[Rows], out: Tensor, plan: Schedule, precision: str, signs: Tensor | None
) -> None:
    """Launch one block of threads for every item of the schedule."""
    if not len(plan.items):
        return
    sides = (*us, *vs)
    native.correlate(
        [each.data for each in us],
        [each.data for each in vs],
        [each.pitch for each in sides],
        [each.channels for each in sides],
        _aligned(*sides),
        out,
        plan.products,
        plan.items,
        signs,
        plan.tiles.block_m,
        precision == "tf32",
    )


def correlate_group(sources: Tensor, ones: Rows, out: Tensor, plan: Schedule, precision: str, align: int) -> None:
    """Do the same for several sites, whose addresses, pitches and channels are in a table, in units of `align`."""
    if len(plan.items):
        block, tf32 = plan.tiles.block_m, precision == "tf32"
        native.correlate_group(sources, align, ones.data, out, plan.products, plan.items, block, tf32)


def pack(copies: Tensor, programs: int, anchor: Tensor) -> None:
    """Copy maps to rows of channels, as a table of `gpu.COPY_FIELDS` columns says; all have the anchor's dtype."""
    if programs:
        native.pack(copies, anchor, programs, PACK_PIXELS, PACK_CHANNELS)


def reduce(workspace: Tensor, plan: Schedule) -> None:
    """Launch one block of threads for every chunk of every product that was split."""
    if len(plan.sums):
        native.reduce(workspace, plan.sums, SUM_BLOCK)


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


def subtract(h: Rows, v: Rows, weight: Tensor, bias: Tensor, out: Rows, consumer: ConvGeometry, precision: str) -> None:
    """Launch one block of threads for every tile of positions and channels of v."""
    if not weight.shape[2]:
        return
    native.subtract(
        h.data,
        v.data,
        [h.pitch, v.pitch, out.pitch],
        h.channels,
        _aligned(h),
        weight,
        bias,
        out.data,
        [consumer.taps, consumer.kernel_size[1], *consumer.stride, *consumer.padding, *consumer.dilation],
        _block(weight.shape[2]),
        precision == "tf32",
    )


def _block(channels: int) -> int:
    return 16 if channels <= 16 else 32 if channels <= 32 else 64


def _aligned(*sides: Rows) -> bool:
    """Whether all rows can be read by 16 bytes, or 8 where they become float32."""
    return all(alignment(each) > 1 for each in sides)
