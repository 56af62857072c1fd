"""The CUDA kernels run by an emulation on the CPU: against float64, in several orders of their threads."""

import importlib
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from cases import TOLERANCES as MOMENT_TOLERANCES
from cases import Conv2dCase, LinearCase, cases, error, to_double
from test_ops_jacobi import TOLERANCES, assert_decomposes, assert_factors, assert_same_values

from growkern import ops
from growkern.backend import use_backend
from growkern.ops.moments import group

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
        for seed in SEEDS[:2]:
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


@pytest.mark.parametrize("dtype", SINGLE_DOUBLE)
def test_matrices_fit_into_the_shared_memory_of_every_gpu(dtype, jacobi):
    """99 KB for a block is the least, on sm_120: float32 vectors are held there to 128, float64 ones outside."""
    decompose("eigh", torch.eye(2))
    shared = emulation.library("jacobi").most_shared_bytes
    for outside in (False, True):
        shared()
        jacobi(outside=outside)
        decompose("eigh", torch.eye(128, dtype=dtype).expand(1, -1, -1))
        needed = shared()
        assert needed <= (99 << 10 if outside or dtype == torch.float32 else 227 << 10)
    decompose("svd", torch.ones(1, 64, 100, dtype=dtype))
    assert shared() <= 99 << 10


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


# Moments -------------------------------------------------------------------------------------------------

MOMENTS = ("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual")
GROUPED = ("grouped_moments", "grouped_residuals")
# Tiles of every size, aligned or not, several of them, and positions that are split.
LARGE = [
    LinearCase(op="linear_moments", name="one tile", rows=600, widths=(64, 64, 64)),
    LinearCase(op="linear_moments", name="unaligned tiles", rows=600, widths=(66, 33, 20)),
    LinearCase(op="linear_residual", name="tiles", rows=300, widths=(68, 40, 36), draws=1),
    *(
        Conv2dCase(op=op, name=name, batch=2, channels=channels, maps=maps, draws=2, layout=layout)
        for op in ("conv2d_moments", "conv2d_residual")
        for name, channels, maps, layout in (
            ("narrow", (8, 5, 4), (18, 17), "contiguous"),
            ("middle", (20, 32, 24), (7, 4), "channels_last"),
            ("wide", (33, 17, 66), (4, 5), "contiguous"),
        )
    ),
]


@pytest.fixture
def moments(monkeypatch):
    """growkern.ops.moments.cuda over the emulation; call it with a seed to change the order of threads."""
    emulation.on_cpu(monkeypatch, *MOMENTS, *GROUPED)
    engine = importlib.import_module("growkern.ops.moments.cuda")
    group.serve(engine, "cuda")

    def use(seed):
        monkeypatch.setattr(engine, "native", emulation.Moments(seed))

    use(0)
    return use


def moments_of(case, args, named, backend):
    with use_backend(backend):
        return case.function(*args, **named)


@pytest.mark.usefixtures("moments")
@pytest.mark.parametrize("case", cases(*MOMENTS), ids=str)
def test_moments(case):
    for dtype in case.dtypes:
        args, named = case.arguments(dtype, seed=1)
        expected = moments_of(case, *to_double((args, named)), "reference")
        for one, other in zip(moments_of(case, args, named, "cuda"), expected, strict=True):
            assert error(one, other) <= MOMENT_TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in LARGE for dtype in (torch.float32, torch.bfloat16)] + [(LARGE[1], torch.float16)],
    ids=str,
)
def test_moments_of_every_tile(case, dtype, moments):
    args, named = case.arguments(dtype, seed=2)
    expected = moments_of(case, *to_double((args, named)), "reference")
    usual = moments_of(case, args, named, "reference")
    out = moments_of(case, args, named, "cuda")
    for one, other, exact in zip(out, usual, expected, strict=True):
        assert error(one, exact) <= 2 * max(error(other, exact), 2.0**-24)
    if dtype == torch.float32:
        moments(1)
        for one, other in zip(moments_of(case, args, named, "cuda"), out, strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("moments")
def test_tiles_fit_into_shared_memory_without_asking():
    shared = emulation.library("moments").most_shared_bytes
    shared()
    for case, dtype in ((LARGE[0], torch.float32), (LARGE[0], torch.bfloat16), (LARGE[2], torch.float32)):
        args, named = case.arguments(dtype)
        moments_of(case, args, named, "cuda")
        assert 20 << 10 < shared() <= 48 << 10


@pytest.mark.usefixtures("moments")
def test_tf32_rounds_its_operands():
    """tf32 keeps eleven bits of each number; three products of parts keep those of float32."""
    case = LARGE[0]
    args, named = case.arguments(torch.float32)
    expected = moments_of(case, *to_double((args, named)), "reference")
    errors = [
        max(map(error, moments_of(case, args, {**named, "precision": precision}, "cuda"), expected))
        for precision in ("ieee", "tf32")
    ]
    assert errors[0] < 2e-7
    assert 1e-5 < errors[1] < 1e-3


@pytest.mark.usefixtures("moments")
def test_symmetric_moments_are_symmetric_bit_by_bit():
    for case in [case for case in LARGE if case.op.endswith("moments")]:
        args, named = case.arguments(torch.float32)
        xx, _, _, hh, _, vv = moments_of(case, args, named, "cuda")
        assert all(torch.equal(matrix, matrix.T) for matrix in (xx, hh, vv))


@pytest.mark.usefixtures("moments")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_sites_at_once(dtype):
    """Maps that are packed and maps that lie well, matrices, sites of several widths, one without rows."""
    strided = ops.ConvGeometry(3, 2, 1)
    chosen = [
        LinearCase(op="linear_moments", name="", rows=40, widths=(20, 9, 6)),
        LinearCase(op="linear_moments", name="", rows=0, widths=(5, 4, 3)),
        LinearCase(op="linear_moments", name="", rows=70, widths=(64, 40, 8), x_bias=False),
        Conv2dCase(op="conv2d_moments", name="", channels=(3, 5, 4)),
        Conv2dCase(op="conv2d_moments", name="", channels=(24, 8, 16), layout="channels_last", kernel="center"),
        Conv2dCase(op="conv2d_moments", name="", channels=(4, 17, 3), consumer=strided, maps=(9, 15)),
    ]
    calls = [ops.moments.Call(*args, **named) for args, named in (case.arguments(dtype) for case in chosen)]
    with use_backend("cuda"):
        out = ops.moments.grouped_moments(calls)
    with use_backend("reference"):
        exact = [call._replace(x=call.x.double(), h=call.h.double(), v=call.v.double()) for call in calls]
        expected = ops.moments.grouped_moments(exact)
    for six, right in zip(out, expected, strict=True):
        assert all(error(one, other) <= MOMENT_TOLERANCES[dtype] for one, other in zip(six, right, strict=True))


@pytest.mark.usefixtures("moments")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_of_many_sites_at_once(dtype):
    """More positions to an image than draws, or fewer; no draws; a float64 update; a consumer of the whole map."""
    whole = {"consumer": ops.ConvGeometry((7, 6)), "kernel": "full"}
    chosen = [
        LinearCase(op="linear_residual", name="", rows=40, widths=(20, 9, 6)),
        LinearCase(op="linear_residual", name="", rows=41, widths=(5, 4, 18), rows_per_sign=9),
        LinearCase(op="linear_residual", name="", rows=10, widths=(5, 4, 18), rows_per_sign=3),
        LinearCase(op="linear_residual", name="", rows=33, widths=(64, 40, 17), x_bias=False, draws=0),
        LinearCase(op="linear_residual", name="", rows=70, widths=(12, 20, 68)),
        Conv2dCase(op="conv2d_residual", name="", channels=(3, 5, 4)),
        Conv2dCase(op="conv2d_residual", name="", channels=(24, 8, 16), layout="channels_last", kernel="center"),
        Conv2dCase(op="conv2d_residual", name="", h_bias=False, draws=40),
        Conv2dCase(op="conv2d_residual", name="", **whole),
    ]
    calls = []
    for case in chosen:
        (x, h, v, update), named = case.arguments(dtype)
        drawn = named.pop("signs"), named.pop("rows_per_sign", 1)
        update = update.double() if case is chosen[-1] else update
        calls.append(ops.moments.Residual(ops.moments.Call(x, h, v, **named), update, *drawn))
    with use_backend("cuda"):
        out = ops.moments.grouped_residuals(calls)
    with use_backend("reference"):
        doubled = [call._replace(x=call.x.double(), h=call.h.double(), v=call.v.double()) for call, *_ in calls]
        exact = [
            each._replace(call=call, update=each.update.double(), signs=each.signs.double())
            for each, call in zip(calls, doubled, strict=True)
        ]
        expected = ops.moments.grouped_residuals(exact)
    for three, right in zip(out, expected, strict=True):
        assert all(error(one, other) <= MOMENT_TOLERANCES[dtype] for one, other in zip(three, right, strict=True))


@pytest.mark.usefixtures("moments")
def test_elements_beyond_two_to_the_31():
    """The tensor is virtual memory: only the pages of its three rows are ever touched."""
    far = 2**30 + 40
    x = torch.empty(2 * far + 5, dtype=torch.bfloat16).as_strided((3, 5), (far, 1))
    x.copy_(torch.arange(15).view(3, 5))
    with use_backend("cuda"):
        out = ops.linear_moments(x, x, x)
    assert all(torch.equal(each.double(), x.double().T @ x.double()) for each in out)
