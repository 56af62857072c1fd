"""Second moments by Triton: what `gpu` asks of an engine. The kernels are imported when the first one is needed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from growkern.backend import INTERPRETED
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan
from growkern.ops.moments.rows import COPY_FIELDS, PACK_CHANNELS, PACK_PIXELS, SUBTRACT_FIELDS, Rows, alignment
from growkern.ops.moments.schedule import (
    ASSEMBLE_COLUMNS,
    ASSEMBLE_ROWS,
    COMBINE_BLOCK,
    COMBINE_DRAWS,
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
    us: Sequence[Rows],
    vs: Sequence[Rows],
    out: Tensor,
    plan: Schedule,
    precision: str,
    signs: Tensor | None,
) -> None:
    """Launch one program for every item of the schedule."""
    sides = (us[0], us[1], vs[2])
    align = alignment(*us, *vs)
    arguments: tuple[Any, ...] = (
        *(each.data for each in (*us, *vs)),
        *(each.pitch // align for each in sides),
        *(each.channels // align for each in sides),
        len(us[0].data),
        out,
        plan.products,
        *((out, 0) if signs is None else (signs, signs.stride(0))),
        plan.products,
        plan.products,
    )
    dtypes = us[0].data.dtype, vs[2].data.dtype
    matrix, wide = us[0].data.ndim == 2, _wide(*us, *vs)
    _correlate(arguments, plan, dtypes, precision, align, False, matrix, wide)


def correlate_group(
    sources: Tensor, u: Tensor, v: Tensor, out: Tensor, plan: Schedule, precision: str, draws: Tensor | None
) -> None:
    """Do the same for several sites, from tables."""
    sides, sizes = [u] * 4 + [v] * 4, [0] * 7
    tables = plan.products, out, 0, sources, plan.products if draws is None else draws
    dtypes = u.dtype, v.dtype
    align = 16 // min(u.itemsize, v.itemsize)
    _correlate((*sides, *sizes, out, *tables), plan, dtypes, precision, align, True, False, False)


def _correlate(
    arguments: tuple[Any, ...],
    plan: Schedule,
    dtypes: tuple[torch.dtype, torch.dtype],
    precision: str,
    align: int,
    grouped: bool,
    matrix: bool,
    wide: bool,
) -> None:
    from growkern.ops.moments import _triton as kernels

    tiles, half = plan.tiles, dtypes[1].itemsize == 2
    for block_m, block_n, shifts, signed, warps, items in plan.launches:
        kernels.correlate_kernel[(len(items),)](
            *arguments,
            items,
            ALIGN=align,
            GROUPED=grouped,
            MATRIX=matrix,
            WIDE=wide,
            SIGNED=signed,
            PRECISION=_precision(precision, half, items.device),
            OPERAND=_operand(*dtypes),
            CHAIN=CHAIN // tiles.block_k if half else 0,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=tiles.block_k,
            SHIFTS=shifts,
            FIELDS=FIELDS,
            num_warps=warps,
            num_stages=min(tiles.stages, 2) if signed else tiles.stages,  # signs take registers
            **_registers(signed or (block_m, block_n) != tiles[:2], items.device),
        )


def reduce(workspace: Tensor, plan: Schedule) -> None:
    """Launch one program for every chunk of every product that was split."""
    from growkern.ops.moments import _triton as kernels

    if len(plan.sums):
        kernels.reduce_kernel[(len(plan.sums),)](workspace, plan.sums, BLOCK=SUM_BLOCK)


def combine(workspace: Tensor, plan: Schedule, signs: Tensor, add: bool) -> None:
    """Launch one program for every chunk of every product and some of the draws."""
    _combine(workspace, plan, signs, signs.stride(0), signs.shape[1], plan.sums, False, add)


def combine_group(workspace: Tensor, plan: Schedule, draws: Tensor) -> None:
    """Do the same for several sites, whose signs are in a table."""
    _combine(workspace, plan, workspace, 0, 0, draws, True, False)


def _combine(
    workspace: Tensor, plan: Schedule, signs: Tensor, pitch: int, samples: int, table: Tensor, grouped: bool, add: bool
) -> None:
    from growkern.ops.moments import _triton as kernels

    if not len(plan.sums):
        return
    kernels.combine_kernel[(len(plan.sums), -(-plan.draws // COMBINE_DRAWS))](
        workspace,
        plan.sums,
        signs,
        pitch,
        samples,
        table,
        plan.draws,
        plan.slots,
        GROUPED=grouped,
        ADD=add,
        PRECISION=_precision("ieee", False, workspace.device),
        DRAWS=COMBINE_DRAWS,
        BLOCK=COMBINE_BLOCK,
        num_warps=8,
        **_all_registers(),
    )


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
        **_all_registers(),
    )


def pack(copies: Tensor, programs: int, source: Tensor, target: Tensor) -> None:
    """Launch one program for every tile of every map."""
    from growkern.ops.moments import _triton as kernels

    if programs:
        kernels.pack_kernel[(programs,)](
            copies,
            len(copies),
            source,
            target,
            FIELDS=COPY_FIELDS,
            PIXELS=PACK_PIXELS,
            CHANNELS=PACK_CHANNELS,
        )


def subtract(
    h: Rows, v: Rows, channels: int, weight: Tensor, out: Rows, consumer: ConvGeometry, precision: str
) -> None:
    """Launch one program for every tile of positions and channels of v."""
    from growkern.ops.moments import _triton as kernels

    targets, positions = weight.shape[1], v.data.shape[:-1].numel()
    if not targets:
        return
    rows, columns = v.data.shape[1:3] if v.data.ndim == 4 else (1, 1)
    map_rows, map_columns = h.data.shape[1:3] if h.data.ndim == 4 else (1, 1)
    align, tile = alignment(h, v, out), (64, 32 if targets <= 32 else 64)
    kernels.subtract_kernel[(-(-positions // tile[0]) * -(-targets // tile[1]),)](
        h.data,
        h.pitch // align,
        v.data,
        v.pitch // align,
        weight,
        targets // 4,
        out.data,
        out.pitch // align,
        positions,
        rows * columns,
        columns,
        channels,
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
        **_subtract_options(tile, precision, v.data.device),
    )


def subtract_tile(targets: int) -> tuple[int, int]:
    """Count the positions and channels of v that one program takes of a group, whatever the channels."""
    return 64, 32  # 64 channels spill on sm_80 where sizes come from a table


def subtract_group(
    table: Tensor, programs: int, tile: tuple[int, int], like: Tensor, out: Tensor, align: int, precision: str
) -> None:
    """Launch one program for every tile of positions and channels of every v."""
    from growkern.ops.moments import _triton as kernels

    kernels.subtract_group_kernel[(programs,)](
        table,
        len(table),
        like,
        out,
        FIELDS=SUBTRACT_FIELDS,
        ALIGN=align,
        **_subtract_options(tile, precision, table.device),
    )


def _subtract_options(tile: tuple[int, int], precision: str, device: torch.device) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": 32}
    return {"PRECISION": _precision(precision, False, device), **blocks, **_all_registers()}


def _registers(all_of_them: bool, device: torch.device) -> dict[str, int]:
    """Allow all registers, or on Blackwell those of three programs of four warps; elsewhere the compiler finds them."""
    if all_of_them:
        return _all_registers()
    return {"maxnreg": 168} if gpu_of(device)[1] == "capability 10" else {}


def _all_registers() -> dict[str, int]:
    """Allow all registers, or ptxas spills some of them for the sake of more programs."""
    return {} if torch.version.hip else {"maxnreg": 255}


def _wide(*sides: Rows) -> bool:
    """Whether an element of some side lies further than 32 bits reach."""
    return any(each.data.shape[:-1].numel() * max(1, each.pitch) >= 2**31 - 2**16 for each in sides)


def _operand(u: torch.dtype, v: torch.dtype) -> Any:
    """Choose what is multiplied: float32 where the sides differ; the interpreter has no bfloat16."""
    import triton.language as tl

    if u != v or u == torch.float32 or (u == torch.bfloat16 and INTERPRETED):
        return tl.float32
    return tl.bfloat16 if u == torch.bfloat16 else tl.float16


def _precision(precision: str, half: bool, device: torch.device) -> str:
    """Three products of tf32 halves are as good as float32. Before Ampere there is no tf32; AMD multiplies float32."""
    if precision == "tf32" or half:
        return "tf32"
    return "ieee" if gpu_of(device)[1] in ("hip", "capability 7") else "tf32x3"
