"""Second moments by Triton: what `gpu` asks of an engine. The kernels are imported when the first one is needed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from growkern.backend import INTERPRETED
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.gpu import COPY_FIELDS, PACK_CHANNELS, PACK_PIXELS, Rows, alignment
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
from growkern.ops.moments.tiles import choose, gpu_of

CHAIN = 512  # positions that tensor cores may add up before the sum goes to float32 registers


def tiles(plan: Plan, dtype: torch.dtype, precision: str, device: torch.device) -> Tiles:
    """Choose the tiles by the GPU and the widest source."""
    kind = "matrix" if all(size == (1, 1) for size in plan.sizes) else "map"
    operands = precision if dtype == torch.float32 else "half"
    return choose(gpu_of(device), kind, operands, max(plan.channels))


def correlate(
    us: Sequence[Rows], vs: Sequence[Rows], out: Tensor, plan: Schedule, precision: str, signs: Tensor | None
) -> None:
    """Launch one program for every item of the schedule."""
    sides = (us[0], us[1], vs[2])
    align = alignment(*us, *vs)
    arguments: tuple[Any, ...] = (
        *(each.data for each in (*us, *vs)),
        *(each.pitch // align for each in sides),
        *(each.channels // align for each in sides),
        out,
        plan.products,
        plan.items,
        out if signs is None else signs,
        0 if signs is None else signs.shape[1],
        plan.products,
    )
    dtypes = us[0].data.dtype, vs[2].data.dtype
    matrix, wide = us[0].data.ndim == 2, _wide(*us, *vs)
    _correlate(arguments, plan, dtypes, precision, align, False, matrix, wide, signs is not None)


def correlate_group(sources: Tensor, ones: Rows, out: Tensor, plan: Schedule, precision: str, align: int) -> None:
    """Do the same for several sites, whose addresses, pitches and channels are in a table, in units of `align`."""
    data, dtype = ones.data, ones.data.dtype
    arguments: tuple[Any, ...] = (*[data] * 8, *[0] * 6, out, plan.products, plan.items, out, 0, sources)
    _correlate(arguments, plan, (dtype, dtype), precision, align, True, False, False, False)


def _correlate(
    arguments: tuple[Any, ...],
    plan: Schedule,
    dtypes: tuple[torch.dtype, torch.dtype],
    precision: str,
    align: int,
    grouped: bool,
    matrix: bool,
    wide: bool,
    signed: bool,
) -> None:
    from growkern.ops.moments import _triton as kernels

    tiles, half = plan.tiles, dtypes[1].itemsize == 2
    if not len(plan.items):
        return
    kernels.correlate_kernel[(len(plan.items),)](
        *arguments,
        ALIGN=align,
        GROUPED=grouped,
        MATRIX=matrix,
        WIDE=wide,
        SIGNED=signed,
        PRECISION=_precision(precision, half),
        OPERAND=_operand(*dtypes),
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
    from growkern.ops.moments import _triton as kernels

    if len(plan.sums):
        kernels.reduce_kernel[(len(plan.sums),)](workspace, plan.sums, BLOCK=SUM_BLOCK)


def assemble(slots: Tensor, plan: Schedule, results: Sequence[Tensor]) -> None:
    """Launch one program for every tile of every region and draw."""
    if len(slots):
        _assemble(slots, plan, [*results, *[results[0]] * (6 - len(results))], plan.regions, False)


def assemble_group(slots: Tensor, plan: Schedule, results: Tensor) -> None:
    """Do the same for several sites, the addresses of whose results are in a table."""
    _assemble(slots, plan, [slots] * 6, results, True)


def _assemble(slots: Tensor, plan: Schedule, targets: Sequence[Tensor], addresses: Tensor, grouped: bool) -> None:
    from growkern.ops.moments import _triton as kernels

    if not plan.programs:
        return
    kernels.assemble_kernel[(plan.programs, len(slots))](
        slots,
        slots.stride(0),
        *targets,
        addresses,
        plan.regions,
        plan.starts,
        plan.terms,
        plan.weights,
        len(plan.regions),
        GROUPED=grouped,
        FIELDS=REGION_FIELDS,
        ROWS=ASSEMBLE_ROWS,
        COLUMNS=ASSEMBLE_COLUMNS,
    )


def pack(copies: Tensor, programs: int, anchor: Tensor) -> None:
    """Copy maps to rows of channels, as a table of `gpu.COPY_FIELDS` columns says; all have the anchor's dtype."""
    from growkern.ops.moments import _triton as kernels

    if programs:
        kernels.pack_kernel[(programs,)](
            copies,
            len(copies),
            anchor,
            FIELDS=COPY_FIELDS,
            COUNT=max(16, 1 << (len(copies) - 1).bit_length()),
            PIXELS=PACK_PIXELS,
            CHANNELS=PACK_CHANNELS,
        )


def subtract(h: Rows, v: Rows, weight: Tensor, bias: Tensor, out: Rows, consumer: ConvGeometry, precision: str) -> None:
    """Launch one program for every tile of positions and channels of v."""
    from growkern.ops.moments import _triton as kernels

    targets, positions = weight.shape[2], v.data.shape[:-1].numel()
    if not targets:
        return
    rows, columns = v.data.shape[1:3] if v.data.ndim == 4 else (1, 1)
    map_rows, map_columns = h.data.shape[1:3] if h.data.ndim == 4 else (1, 1)
    align = alignment(h, v, out)
    block = 32 if targets <= 32 else 64
    kernels.subtract_kernel[(-(-positions // 64) * -(-targets // block),)](
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
        # All registers are allowed, or ptxas spills some of them for the sake of more programs.
        **({} if torch.version.hip else {"maxnreg": 255}),
    )


def _wide(*sides: Rows) -> bool:
    """Whether an element of some side lies further than 32 bits reach."""
    return any(each.data.shape[:-1].numel() * max(1, each.pitch) >= 2**31 - 2**16 for each in sides)


def _operand(u: torch.dtype, v: torch.dtype) -> Any:
    """Choose what is multiplied: float32 where the sides differ; the interpreter has no bfloat16."""
    import triton.language as tl

    if u != v or u == torch.float32 or (u == torch.bfloat16 and INTERPRETED):
        return tl.float32
    return tl.bfloat16 if u == torch.bfloat16 else tl.float16


def _precision(precision: str, half: bool) -> str:
    """Three products of tf32 halves are as good as float32; AMD has no such thing, but matrix units for float32."""
    if precision == "tf32" or half:
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"
