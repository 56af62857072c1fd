"""The CUDA kernels run by an emulation on the CPU: against float64, in several orders of their threads."""

import importlib
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from cases import cases
from test_ops_jacobi import TOLERANCES, assert_decomposes, assert_factors, assert_same_values

from growkern import ops
from growkern.backend import use_backend

SINGLE_DOUBLE = (torch.float32, torch.float64)
SEEDS = (0, 1, 2)


# The emulation finds what it is there to find ------------------------------------------------------------


def run_toy(name, threads, *options):
    values, out = torch.arange(threads).float(), torch.full((threads,), torch.nan)
    getattr(emulation.library("toy"), name)(emulation.pointer(values), emulation.pointer(out), threads, *options)
    return values, out


@pytest.mark.parametrize("threads", [64, 100, 512])
def test_a_missing_barrier_is_found(threads):
    for seed in SEEDS:
        values, out = run_toy("toy_reverse", threads, 1, seed)
        assert torch.equal(out, values.flip(0))
        _, raced = run_toy("toy_reverse", threads, 0, seed)
        assert not torch.equal(raced, values.flip(0))
    _, other = run_toy("toy_reverse", threads, 0, SEEDS[-1] + 1)
    assert not torch.equal(raced.isnan(), other.isnan())


def test_shared_memory_that_is_not_set_is_found():
    for seed in SEEDS:
        values, out = run_toy("toy_sum", 64, 1, seed)
        assert torch.equal(out[:2], values.view(2, 32).sum(1))
        assert run_toy("toy_sum", 64, 0, seed)[1].isnan().all()


def test_a_barrier_that_some_threads_never_reach_is_found():
    emulation.library("toy")
    code = "import emulation; emulation.library('toy').toy_leave(64)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "wait at a barrier" in done.stderr


# Decompositions ------------------------------------------------------------------------------------------


@pytest.fixture
def jacobi(monkeypatch):
    """growkern.ops.jacobi.cuda over the emulation; call it with a seed to change the order of threads."""
    emulation.on_cpu(monkeypatch, "eigh", "svd")
    module = importlib.reload(importlib.import_module("growkern.ops.jacobi.cuda"))

    def use(**options):
        monkeypatch.setattr(module, "native", emulation.Jacobi(**options))

    use()
    return use


def decompose(op, a):
    with use_backend("cuda"):
        return getattr(ops, op)(a)


@pytest.mark.parametrize("case", cases("eigh"), ids=str)
def test_eigh(case, jacobi):
    for dtype in case.dtypes:
        (a,), _ = case.arguments(dtype)
        results = []
        for seed in SEEDS:
            jacobi(seed=seed, outside=seed == 1)
            results.append(decompose("eigh", a))
        w, q = results[0]
        assert_decomposes(a, w, q, TOLERANCES[dtype])
        assert_same_values(w, torch.linalg.eigvalsh(a.double()), a, TOLERANCES[dtype])
        for other in results[1:]:
            assert torch.equal(w, other[0])
            assert torch.equal(q, other[1])


@pytest.mark.parametrize("case", cases("svd"), ids=str)
def test_svd(case, jacobi):
    for dtype in case.dtypes:
        (a,), _ = case.arguments(dtype)
        results = []
        for seed in SEEDS[:2]:
            jacobi(seed=seed)
            results.append(decompose("svd", a))
        assert_factors(a, *results[0], TOLERANCES[dtype])
        assert_same_values(results[0][1], torch.linalg.svdvals(a.double()), a, TOLERANCES[dtype])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.usefixtures("jacobi")
@pytest.mark.parametrize("dtype", SINGLE_DOUBLE)
@pytest.mark.parametrize("n", [*range(1, 20), 32, 47, 48, 49, 64, 80, 81, 127, 128])
def test_eigh_of_every_size(n, dtype):
    a = torch.randn(1, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    a = a + a.mT
    assert_decomposes(a, *decompose("eigh", a), TOLERANCES[dtype])


@pytest.mark.usefixtures("jacobi")
@pytest.mark.parametrize("n", [2, 5, 16, 33, 64])
def test_eigenvalues_are_at_most_twice_as_wrong_as_those_of_pytorch(n):
    a = torch.randn(16, n, n, generator=torch.Generator().manual_seed(n))
    a = a + a.mT
    exact = torch.linalg.eigvalsh(a.double())
    assert (decompose("eigh", a)[0] - exact).norm() <= 2 * (torch.linalg.eigvalsh(a) - exact).norm()


@pytest.mark.usefixtures("jacobi")
def test_large_or_empty_matrices_go_to_torch():
    for shape in ((1, 129, 129), (2, 0, 0), (0, 5, 5)):
        a = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        a = a + a.mT
        with use_backend("reference"):
            expected = ops.eigh(a), ops.svd(a[..., :70])
        for out, reference in zip((decompose("eigh", a), decompose("svd", a[..., :70])), expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(out, reference, strict=True))


@pytest.mark.usefixtures("jacobi")
@pytest.mark.parametrize("dtype", SINGLE_DOUBLE)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (70, 1), (2, 3), (5, 5), (64, 64), (64, 200), (131, 7)])
def test_svd_of_every_shape(m, n, dtype):
    a = torch.randn(1, m, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    u, s, vh = decompose("svd", a)
    assert_factors(a, u, s, vh, TOLERANCES[dtype])
    assert_same_values(s, torch.linalg.svdvals(a.double()), a, TOLERANCES[dtype])


@pytest.mark.usefixtures("jacobi")
@pytest.mark.parametrize("dtype", SINGLE_DOUBLE)
def test_small_singular_values_keep_their_digits(dtype):
    """Columns of very different sizes: one-sided Jacobi is accurate relative to each singular value."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(40, 12, generator=generator, dtype=torch.float64))
    exact = torch.logspace(0, -12, 12, dtype=torch.float64)
    a = (q * exact).to(dtype)
    s = decompose("svd", a)[1].double()
    assert ((s - exact).abs() / exact).max() < 20 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("jacobi")
@pytest.mark.parametrize("op", ["eigh", "svd"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_that_is_not_finite_comes_back_nan_alone(op, bad):
    a = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    a = a + a.mT
    spoiled = a.clone()
    spoiled[1, 0, 2] = bad
    for part, whole in zip(decompose(op, spoiled), decompose(op, a), strict=True):
        assert part[1].isnan().all()
        assert torch.equal(part[[0, 2]], whole[[0, 2]])


@pytest.mark.usefixtures("jacobi")
def test_the_lower_triangle_counts():
    a = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))
    symmetric = a.tril() + a.tril(-1).mT
    for one, other in zip(decompose("eigh", a), decompose("eigh", symmetric), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("jacobi")
def test_rank_deficient_factors_are_orthonormal():
    """Exact zeros among the singular values, in any place: their vectors are made up, and are orthonormal."""
    for rank, shape in ((0, (6, 4)), (2, (9, 5)), (3, (4, 30)), (1, (64, 64))):
        a = torch.zeros(shape)
        a[:rank, -rank - 1 : -1] = torch.randn(rank, rank, generator=torch.Generator().manual_seed(rank))
        u, s, vh = decompose("svd", a)
        assert_factors(a, u, s, vh, TOLERANCES[torch.float32])
        assert (s[rank:] == 0).all()
