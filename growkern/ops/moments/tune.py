"""Time the Triton kernels of the moments with several tiles, and keep the fastest."""

import itertools
import math
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from growkern.ops.moments import gpu, reference, tiles
from growkern.ops.moments import triton as engine
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan
from growkern.ops.moments.schedule import Tiles

WIDTHS = (16, 32, 64, 128, 256, 512)
OPERANDS = {"ieee": torch.float32, "tf32": torch.float32, "half": torch.bfloat16}
ERROR = {"ieee": 2e-6, "tf32": 2e-3, "half": 2e-6}  # largest that a candidate may make to be timed
REPEATS = 5
CHANGES: list[dict[str, int]] = [
    *({"block_m": m, "block_n": n, "warps": w} for m, n, w in ((32, 32, 2), (64, 64, 4), (128, 64, 8), (128, 128, 8))),
    {"block_k": 16},
    {"block_k": 64},
    {"warps": 4},
    {"warps": 8},
    {"stages": 2},
    {"stages": 4},
    {"programs": 1},
    {"programs": 2},
    {"programs": 4},
    {"shifts": 2, "warps": 8},
    {"shifts": 2, "warps": 4, "programs": 2},
    {"shifts": 4, "warps": 8},
]


def tune(device: torch.device, widths: tuple[int, ...] = WIDTHS) -> Iterator[dict[str, Any]]:
    """Find fast tiles for matrices and maps of several widths in every precision, one property after the other.

    Parameters
    ----------
    device : torch.device
        The GPU.
    widths : tuple of int
        Channels to try.

    Yields
    ------
    dict
        Kinds, operands, width, the fastest tiles, its milliseconds, and those of the tiles in use so far.
    """
    for kind, operands, width in itertools.product(("map", "matrix"), OPERANDS, widths):
        tensors, right = _problem(kind, OPERANDS[operands], width, device)
        precision = "tf32" if operands == "tf32" else "ieee"

        def time(candidate: Tiles) -> float:
            try:
                return _milliseconds(candidate, tensors, right, precision, ERROR[operands])  # noqa: B023
            except torch.AcceleratorError:  # of the device, which then stays unusable
                raise
            except Exception:  # what does not compile or fit here is no candidate
                return math.inf

        best = tiles.choose(tiles.gpu_of(device), kind, operands, width)
        fastest = before = time(best)
        for change in CHANGES:
            candidate = best._replace(**change)
            if candidate != best and _fits(candidate, kind, width):
                taken = time(candidate)
                if taken < fastest:
                    best, fastest = candidate, taken
        if fastest < math.inf:
            found = {"kinds": [kind], "operands": operands, "width": width, "tiles": best._asdict()}
            yield found | {"ms": fastest, "before": before}


def _fits(candidate: Tiles, kind: str, width: int) -> bool:
    """Whether tiles are worth a try: at most twice as wide as the channels, and without shifts where there are none."""
    return max(candidate.block_m, candidate.block_n) <= max(16, 2 * width) and (kind == "map" or candidate.shifts == 1)


def _shape(kind: str, width: int) -> tuple[int, ...]:
    """Shape of the x, h and v on which tiles are timed."""
    side = max(4, min(32, 2048 // width))
    return (16384, width) if kind == "matrix" else (128, width, side, side)


def _with_tiles(candidate: Tiles) -> Any:
    """Make an engine that cuts everything in one way."""

    def choose(plan: Plan, dtype: torch.dtype, precision: str, device: torch.device) -> Tiles:
        return candidate

    return types.SimpleNamespace(**{**vars(engine), "tiles": choose})


def _problem(kind: str, dtype: torch.dtype, width: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """x, h and v of a given width, and the moments of a few of their samples in float64."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(_shape(kind, width), generator=generator, device=device).to(dtype) for _ in range(3)]
    few = [tensor[: _few(tensor)].double() for tensor in tensors]
    return tensors, list(_moments(reference, few, "ieee"))


def _few(tensor: Tensor) -> int:
    """Count the samples on which a candidate is checked: enough for several programs and chains."""
    return 4096 if tensor.ndim == 2 else 16


def _moments(owner: Any, tensors: list[Tensor], precision: str, *engines: Any) -> tuple[Tensor, ...]:
    if tensors[0].ndim == 2:
        return owner.linear_moments(*engines, *tensors, False, False, precision)
    same = ConvGeometry(3, 1, 1).pack()
    return owner.conv2d_moments(*engines, *tensors, same, same, "full", False, False, precision)


def _milliseconds(candidate: Tiles, tensors: list[Tensor], right: list[Tensor], precision: str, most: float) -> float:
    """Median over replays of a graph, so that launches cost nothing, with a cold L2; a wrong sum is an error."""
    tuned = _with_tiles(candidate)
    few = _moments(gpu, [tensor[: _few(tensor)] for tensor in tensors], precision, tuned)
    for out, expected in zip(few, right, strict=True):
        if (out.double() - expected).norm() > most * expected.norm():
            raise ArithmeticError(f"{candidate} is wrong")
    _moments(gpu, tensors, precision, tuned)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _moments(gpu, tensors, precision, tuned)
    evicting = torch.empty(256 * 2**20, dtype=torch.int8, device=tensors[0].device)
    times = []
    for _ in range(REPEATS + 1):
        evicting.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[1:])[REPEATS // 2]
