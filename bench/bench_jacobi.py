"""Batched decompositions beside torch.linalg, and on a GPU beside the batched Jacobi routine of cuSOLVER."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import work
from cases import TOLERANCES, Case, cases, error
from machine import ceiling_of
from race import TOLERANCES as LOOSE
from race import Race, Way, described, own_ways
from torch import Tensor


def rows(size: str, device: str) -> Iterator[Any]:
    for case in cases("eigh", "svd", size=size):
        for dtype in case.dtypes:
            yield pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")


def torch_ways(op: str, a: Tensor) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    if op == "svd":
        yield "torch.linalg.svd", "users", lambda: torch.linalg.svd(a, full_matrices=False)
        for driver in ("gesvdj", "gesvda")[: 2 * a.is_cuda]:
            yield driver, "pytorch", lambda driver=driver: torch.linalg.svd(a, full_matrices=False, driver=driver)
        return
    yield "torch.linalg.eigh", "users", lambda: torch.linalg.eigh(a)
    if a.is_cuda:
        try:
            import cupy
        except ImportError:
            return

        def jacobi() -> tuple[Tensor, ...]:
            return tuple(map(torch.from_dlpack, cupy.linalg.eigh(cupy.from_dlpack(a))))

        yield "cuSOLVER by CuPy", "pytorch", jacobi


def together(op: str, out: Any) -> Tensor:
    """The matrices that a decomposition puts together again."""
    if op == "eigh":
        return (out[1] * out[0][..., None, :]) @ out[1].mT
    return (out[0] * out[1][..., None, :]) @ out[2]


def apart(op: str, out: Any) -> float:
    """How far vectors are from orthonormal, per entry."""
    vectors = [out[1]] if op == "eigh" else [out[0], out[2].mT]
    return max(float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().max()) for q in vectors)


@pytest.mark.rows.with_args(rows)
def test_decompositions(case: Case, dtype: torch.dtype, race: Race, device: str) -> None:
    (a,), _ = case.arguments(dtype, device=device)
    call = partial(case.function, a)
    tolerance = 10 * TOLERANCES[dtype]
    ways = own_ways(case.op, call, device, tolerance)
    ways += [Way(name, kind, run, max(tolerance, LOOSE[dtype])) for name, kind, run in torch_ways(case.op, a)]
    race(
        described(case, dtype, "ieee", device),
        ways,
        lambda out: max(error(together(case.op, tuple(t.double() for t in out)), a.double()), apart(case.op, out)),
        operations=work.operations(case),
        nbytes=work.nbytes([a], call()),
        ceiling=ceiling_of(dtype, "ieee"),
        ahead=True,
    )
