"""The ops on a GPU, by every backend that runs there: tiles, streams, devices, and what waits for the device."""

import pytest
import torch
from cases import TOLERANCES, cases, error, to_double
from test_cuda_kernels import LARGE
from test_ops_jacobi import TOLERANCES as JACOBI_TOLERANCES
from test_ops_jacobi import assert_decomposes, assert_factors

from growkern import ops
from growkern.backend import DEVICES, available, use_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

OPS = ("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual", "eigh", "svd")


def on_gpu(op):
    return [backend for backend in available(op) if "cuda" in DEVICES.get(backend, ())]


def run(case, args, named, backend):
    with use_backend(backend):
        return case.function(*args, **named)


@pytest.mark.parametrize(
    ("case", "dtype", "backend"),
    [
        (case, dtype, backend)
        for case in LARGE
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for backend in on_gpu(case.op)
    ],
    ids=str,
)
def test_moments_of_every_tile(case, dtype, backend):
    args, named = case.arguments(dtype, seed=2, device="cuda")
    expected = run(case, *to_double((args, named)), "reference")
    usual = run(case, args, named, "reference")
    out = run(case, args, named, backend)
    for one, other, exact in zip(out, usual, expected, strict=True):
        assert error(one, exact) <= min(TOLERANCES[dtype], 2 * max(error(other, exact), 2.0**-22))
    again = run(case, args, named, backend)
    assert all(torch.equal(one, other) for one, other in zip(out, again, strict=True))


SMALL = [
    case
    for case in cases(*OPS)
    if case.name
    in ("33 rows", "no bias", "3×3-full", "3×3 strided-center", "dilation 2-full", "33", "2×2", "wide", "zero")
]


@pytest.mark.parametrize(
    ("case", "dtype", "backend"),
    [(case, dtype, backend) for case in SMALL for dtype in case.dtypes for backend in on_gpu(case.op)],
    ids=str,
)
def test_small_cases(case, dtype, backend):
    """Little enough for a sanitizer."""
    args, named = case.arguments(dtype, device="cuda")
    out = run(case, args, named, backend)
    if case.op == "eigh":
        assert_decomposes(args[0], *out, JACOBI_TOLERANCES[dtype])
    elif case.op == "svd":
        assert_factors(args[0], *out, JACOBI_TOLERANCES[dtype])
    else:
        expected = run(case, *to_double((args, named)), "reference")
        assert all(error(one, other) <= TOLERANCES[dtype] for one, other in zip(out, expected, strict=True))


@pytest.mark.parametrize("backend", on_gpu("conv2d_moments"))
@pytest.mark.parametrize("channels", [8, 64, 192])
def test_long_sums(backend, channels):
    """More images than any emulation has time for."""
    geometry = ops.ConvGeometry(3, 1, 1)
    x, h, v = (torch.randn(64, channels, 16, 16, device="cuda") + 0.3 for _ in range(3))
    options = {"producer": geometry, "consumer": geometry, "x_bias": True, "h_bias": True}
    with use_backend("reference"):
        expected = ops.conv2d_moments(x.double(), h.double(), v.double(), **options)
    with use_backend(backend):
        out = ops.conv2d_moments(x, h, v, **options)
    assert all(error(one, other) <= TOLERANCES[torch.float32] for one, other in zip(out, expected, strict=True))


@pytest.mark.parametrize("backend", on_gpu("eigh"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 15, 33, 64, 100, 127, 128, 129])
def test_eigh(n, dtype, backend):
    a = torch.randn(40, n, n, device="cuda", dtype=dtype)
    a = a @ a.mT if n % 2 else a + a.mT
    with use_backend(backend):
        w, q = ops.eigh(a)
    assert_decomposes(a, w, q, JACOBI_TOLERANCES[dtype])


@pytest.mark.parametrize("backend", on_gpu("svd"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (33, 20), (20, 33), (64, 64), (64, 500), (70, 70), (64, 5000)])
def test_svd(m, n, dtype, backend):
    a = torch.randn(20, m, n, device="cuda", dtype=dtype)
    with use_backend(backend):
        u, s, vh = ops.svd(a)
    assert_factors(a, u, s, vh, JACOBI_TOLERANCES[dtype])


SAMPLES = [case for case in cases(*OPS) if case.name in ("1000 rows", "3×3-full", "3×3-center", "33", "tall")]


@pytest.mark.parametrize(
    ("case", "backend"), [(case, backend) for case in SAMPLES for backend in on_gpu(case.op)], ids=str
)
def test_the_current_stream_is_used(case, backend):
    """Inputs are written in a stream that is kept busy; an op in another stream would read zeros."""
    args, named = case.arguments(torch.float32, device="cuda")
    expected = run(case, args, named, backend)
    late = [torch.zeros_like(tensor) for tensor in args]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for tensor, values in zip(late, args, strict=True):
            tensor.copy_(values)
        out = run(case, late, named, backend)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(out, expected, strict=True))


@pytest.mark.parametrize(
    ("case", "backend"), [(case, backend) for case in SAMPLES for backend in on_gpu(case.op)], ids=str
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_nothing_waits_for_the_device(case, backend):
    args, named = case.arguments(torch.float32, device="cuda")
    run(case, args, named, backend)  # tables and compiled kernels are made the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, args, named, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize(
    ("case", "backend"), [(case, backend) for case in SAMPLES for backend in on_gpu(case.op)], ids=str
)
def test_tensors_on_another_device(case, backend):
    args, named = case.arguments(torch.float32, device="cuda:1")
    exact = run(case, *to_double((args, named)), "reference")
    out = run(case, args, named, backend)
    assert {result.device for result in out} == {torch.device("cuda:1")}
    assert [one.shape for one in out] == [other.shape for other in exact]
    if case.op not in ("eigh", "svd"):
        assert all(error(one, other) <= TOLERANCES[torch.float32] for one, other in zip(out, exact, strict=True))


@pytest.mark.parametrize("backend", on_gpu("linear_moments"))
@pytest.mark.parametrize("columns", [5, 8])  # rows that are copied, and rows that are read where they lie
def test_elements_beyond_two_to_the_31(backend, columns):
    far = 2**30 + 40
    x = torch.empty(2 * far + columns, dtype=torch.bfloat16, device="cuda").as_strided((3, columns), (far, 1))
    x.copy_(torch.arange(3 * columns).view(3, columns))
    with use_backend(backend):
        out = ops.linear_moments(x, x, x)
    assert all(torch.equal(each.double(), x.double().T @ x.double()) for each in out)
