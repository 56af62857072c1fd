"""The second moments and their residual pass: every case, dtype, precision and backend beside PyTorch and gromo."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import baselines
import peer
import pytest
import torch
import work
from cases import TOLERANCES, Case, Conv2dCase, cases, error, to_double
from machine import ceiling_of
from race import TF32, Race, Way, at_precision, described, own_ways
from race import TOLERANCES as LOOSE
from torch import Tensor

from growkern.backend import use_backend

OPS = ("conv2d_moments", "linear_moments", "conv2d_residual", "linear_residual")
LIMIT = {"cpu": 4e11, "cuda": float("inf")}  # operations of a row


def rows(size: str, device: str) -> Iterator[Any]:
    """Single and half precision, on a GPU tf32 too; on a CPU, where half precision is a copy, not of everything.

    float16 comes last: its kernels are those of bfloat16.
    """
    for op in OPS:
        for case in cases(op, size=size):
            side = "residual" in op or getattr(case, "kernel", "") == "center"
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                half_on_cpu = device == "cpu" and dtype != torch.float32
                if dtype not in case.dtypes or work.operations(case) > LIMIT[device] or (half_on_cpu and side):
                    continue
                for name in ("ieee", "tf32")[: 1 + (dtype == torch.float32 and device == "cuda")]:
                    text = f"{case}-{str(dtype).removeprefix('torch.')}-{name}"
                    rank = 4 if dtype == torch.float16 else 3 if half_on_cpu else 2 if side else 0
                    yield pytest.param(case, dtype, name, id=text, marks=pytest.mark.later(rank))


@pytest.mark.rows.with_args(rows)
def test_moments(case: Case, dtype: torch.dtype, precision: str, race: Race, device: str, patience: bool) -> None:
    measure(case, dtype, precision, race, device, float("inf") if patience else peer.LIMIT[device])


def measure(case: Case, dtype: torch.dtype, name: str, race: Race, device: str, limit: float) -> None:
    """A row; `limit` is on the operations of gromo."""
    args, named = case.arguments(dtype, device=device)
    double = to_double((args, named))
    with use_backend("reference"):
        expected = case.function(*double[0], **double[1])
    del double
    call = partial(case.function, *args, **named, precision=name)
    loose = TF32 if name == "tf32" else LOOSE[dtype]
    ways = own_ways(case.op, call, device, TF32 if name == "tf32" else TOLERANCES[dtype])
    ways += [Way(text, kind, run, loose) for text, kind, run in baselines.ways(case, args, named, call)]
    left_out = {}
    if case.op.endswith("moments") and dtype == torch.float32 and name == "ieee":
        left_out = add_gromo(ways, case, args, limit, loose)
    half = dtype == torch.float16
    with at_precision(device, "tf32" if half else name):
        race(
            described(case, dtype, name, device),
            ways,
            lambda out: max(map(error, out, expected)),
            operations=work.operations(case),
            nbytes=work.nbytes(args, named, expected if dtype == torch.float64 else [t.float() for t in expected]),
            ceiling=ceiling_of(torch.float32 if half and device == "cpu" else dtype, name),
            left_out=left_out,
            ahead=True,
        )


def add_gromo(ways: list[Way], case: Case, args: tuple[Tensor, ...], limit: float, tolerance: float) -> dict[str, str]:
    """gromo's classes where they sum the same; why not where they do not."""
    takes = peer.operations(case)
    if isinstance(case, Conv2dCase) and case.kernel == "center" and not case.hidden == case.outputs == case.maps:
        return {"gromo": "its S of growth sums other positions"}
    if takes > limit:
        return {"gromo": f"takes {takes / 1e12:,.0f} TFLOP"}
    try:
        ways.append(Way("gromo", "gromo", peer.statistics(case, args), tolerance))
    except ImportError:
        return {"gromo": "not installed"}
    return {}
