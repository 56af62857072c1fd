"""The compiled library: every instruction set, what it links to, its memory, and what only it could get wrong."""

import itertools
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import TOLERANCES, Conv2dCase, LinearCase, cases, error, to_double
from stable_interface import assert_stable
from test_ops_jacobi import TOLERANCES as EIGH_TOLERANCES
from test_ops_jacobi import assert_decomposes, assert_same_values

import growkern
from growkern import backend, ops
from growkern.backend import available, use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, grouped_moments
from growkern.ops.native import build_info

PACKAGE = Path(growkern.__file__).parent

pytestmark = pytest.mark.skipif("cpp" not in available("linear_moments"), reason="no compiled library here")

NAMES = ("xx", "xh", "xv", "hh", "hv", "vv")
SETS = ("avx512", "avx2", "portable")
MOMENTS = cases("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual")
EIGH = [case for case in cases("eigh") if case.shape[-1] > 0]
# Several blocks of channels, chains of sums longer than one, and more images than are packed at once.
LARGE = [
    LinearCase(op="linear_moments", name="large", rows=3001, widths=(70, 40, 33)),
    LinearCase(op="linear_residual", name="large", rows=3001, widths=(70, 40, 33), draws=2),
    LinearCase(op="linear_moments", name="read in place", rows=3001, widths=(16, 32, 64)),
    *(
        Conv2dCase(op=op, name=name, batch=5, channels=channels, maps=(33, 18), kernel=kernel, draws=2)
        for op in ("conv2d_moments", "conv2d_residual")
        for kernel in ("full", "center")
        for name, channels in (("narrow", (8, 5, 4)), ("wide", (33, 17, 40)))
    ),
]
# One draw, under which images come in the order of their signs, by every way in which sums are made.
ONE_DRAW = [
    LinearCase(op="linear_residual", name="one draw", rows=3001, widths=(70, 32, 33), draws=1),
    *(
        Conv2dCase(op="conv2d_residual", name=f"one draw {name}", batch=batch, channels=channels, draws=1, **options)
        for name, batch, channels, options in (
            ("wide", 5, (33, 17, 40), {"maps": (33, 18), "kernel": "center"}),
            ("narrow", 40, (8, 5, 4), {"maps": (17, 9)}),
            ("of one image", 1, (33, 17, 40), {"maps": (9, 8)}),
            ("gathered", 9, (5, 17, 20), {"maps": (17, 11), "producer": ConvGeometry(2, 3)}),
            ("transformed", 33, (33, 5, 17), {"maps": (8, 7)}),
            ("transformed tiles", 5, (33, 5, 17), {"maps": (37, 34)}),
            ("stride 2", 33, (33, 5, 17), {"maps": (9, 8), "consumer": ConvGeometry(3, 2, 1)}),
            ("phases", 33, (33, 5, 17), {"maps": (17, 16), "producer": ConvGeometry(3, 2, 1)}),
        )
    ),
]  # fmt: skip
# Runs of rows that share a sign, more than wait to be added up under the draws, and one that is divided.
RUNS = [
    LinearCase(op="linear_residual", name="runs", rows=1000, widths=(33, 65, 10), draws=17, rows_per_sign=64),
    LinearCase(op="linear_residual", name="a long run", rows=12288, widths=(5, 17, 3), draws=2, rows_per_sign=8192),
]
# Enough channels and images that sums over all positions are made by Fourier transforms, of whole maps or of tiles.
TRANSFORMED = [
    Conv2dCase(
        op="conv2d_moments", name=f"transformed {name}-{kernel}", batch=batch, channels=(48, 40, 33), maps=maps,
        producer=producer, consumer=consumer, kernel=kernel,
    )
    for kernel in ("full", "center")
    for name, batch, maps, producer, consumer in (
        ("3×3", 19, (8, 7), ConvGeometry(3, 1, 1), ConvGeometry(3, 1, 1)),
        ("3×3 tiles", 5, (37, 34), ConvGeometry(3, 1, 1), ConvGeometry(3, 1, 1)),
        ("3×3 valid", 16, (10, 12), ConvGeometry(3), ConvGeometry(3)),
        ("3×3 valid tiles", 9, (5, 38), ConvGeometry(3), ConvGeometry(3)),
        ("5×5", 17, (9, 8), ConvGeometry(5, 1, 2), ConvGeometry(5, 1, 2)),
        ("4×4 then 2×2", 16, (9, 8), ConvGeometry(4, 1, 1), ConvGeometry(2)),
        ("1×1 then 3×3", 16, (8, 8), ConvGeometry(1), ConvGeometry(3, 1, 1)),
        ("3×1 then 1×3", 18, (8, 8), ConvGeometry((3, 1), 1, (1, 0)), ConvGeometry((1, 3), 1, (0, 1))),
        ("dilation 2", 16, (9, 8), ConvGeometry(3, 1, 2, 2), ConvGeometry(3, 1, 2, 2)),
        ("wide padding", 16, (8, 8), ConvGeometry(3, 1, 3), ConvGeometry(3, 1, 2)),
        ("3×3 stride 2 then 3×3", 16, (13, 12), ConvGeometry(3, 2, 1), ConvGeometry(3, 1, 1)),
        ("3×3 then 3×3 stride 2", 16, (9, 8), ConvGeometry(3, 1, 1), ConvGeometry(3, 2, 1)),
        ("7×5 stride 2, 1 then stride 1, 2", 16, (15, 8), ConvGeometry((7, 5), (2, 1), 2), ConvGeometry(3, (1, 2), 1)),
        ("3×3 stride 2, dilation 2, twice", 16, (17, 18), ConvGeometry(3, 2, 2, 2), ConvGeometry(3, 2, 1)),
    )
]  # fmt: skip


@pytest.fixture
def _instruction_set(request):
    if not torch.ops.growkern_cpu.use_instruction_set(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield
    torch.ops.growkern_cpu.use_instruction_set("")


every_set = pytest.mark.parametrize("_instruction_set", SETS, indirect=True)


def assert_accurate(case, dtype):
    args, named = case.arguments(dtype, seed=2)
    double_args, double_named = to_double((args, named))
    with use_backend("reference"):
        expected = case.function(*double_args, **double_named)
    with use_backend("cpp"):
        out = case.function(*args, **named)
    for one, other in zip(out, expected, strict=True):
        assert error(one, other) <= TOLERANCES[dtype]


@every_set
@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("case", MOMENTS, ids=str)
def test_moments_of_every_instruction_set(case):
    for dtype in case.dtypes:
        assert_accurate(case, dtype)


@every_set
@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", LARGE + ONE_DRAW + RUNS + TRANSFORMED, ids=str)
def test_large_moments(case, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in case.dtypes:
            assert_accurate(case, dtype)
    finally:
        torch.set_num_threads(before)


CONVOLUTIONS = [case for case in MOMENTS + LARGE + TRANSFORMED if case.op == "conv2d_moments" and case.batch]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_x_beside_ones_comes_from_the_sums_of_its_other_moment(case):
    def calls_of(args, named):
        call = Call(*args, **named)
        nothing = call.h[:, :0]
        return [call, Call(call.x, nothing, nothing, call.producer, ConvGeometry(1), x_bias=True)]

    for dtype in case.dtypes:
        args, named = case.arguments(dtype, seed=2)
        with use_backend("cpp"):
            found = grouped_moments(calls_of(args, named))
        with use_backend("reference"):
            expected = grouped_moments(calls_of(*to_double((args, named))))
        for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert error(one, other) <= TOLERANCES[dtype]
        assert torch.equal(found[1][0], found[1][0].T)


@pytest.mark.parametrize("case", LARGE + ONE_DRAW + RUNS + TRANSFORMED, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(case):
    args, named = case.arguments(torch.float32, seed=3)
    double_args, double_named = to_double((args, named))
    with use_backend("reference"):
        expected = case.function(*double_args, **double_named)
        usual = case.function(*args, **named)
    with use_backend("cpp"):
        out = case.function(*args, **named)
    for one, other, ref in zip(out, usual, expected, strict=True):
        assert error(one, ref) <= 2 * max(error(other, ref), 2.0**-24)


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    for case in LARGE + TRANSFORMED[:2]:
        args, named = case.arguments(torch.float32)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpp"):
                results.append(case.function(*args[:3], **named) if "moments" in case.op else ())
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_symmetric_moments_are_symmetric_bit_by_bit():
    for case in [case for case in LARGE + MOMENTS + TRANSFORMED[:2] if case.op.endswith("moments")]:
        args, named = case.arguments(torch.float32)
        with use_backend("cpp"):
            xx, _, _, hh, _, vv = case.function(*args, **named)
        assert all(torch.equal(matrix, matrix.T) for matrix in (xx, hh, vv))


def test_a_feature_that_is_never_read_has_no_moment():
    """Border sums are subtracted from sums over the map: nothing may be left where all is border."""
    case = Conv2dCase(op="conv2d_moments", name="", batch=70, maps=(1, 33), channels=(16, 16, 16), x_bias=False)
    args, named = case.arguments(torch.float32)
    with use_backend("reference"):
        expected = case.function(*args, **named)[0]
    with use_backend("cpp"):
        xx = case.function(*args, **named)[0]
    assert (expected == 0).sum() > expected.numel() / 2
    assert torch.equal(xx == 0, expected == 0)


@pytest.mark.parametrize("case", [LARGE[0], LARGE[3], TRANSFORMED[0]], ids=str)
def test_nan_spoils_its_own_channel_only(case):
    args, named = case.arguments(torch.float32)
    args[0].select(1, 2).fill_(torch.nan)
    with use_backend("cpp"):
        xx, _, xv, hh, hv, vv = case.function(*args, **named)
    taps = case.producer.taps if isinstance(case, Conv2dCase) else 1
    spoiled = torch.zeros(len(xx), dtype=torch.bool)
    spoiled[2 * taps : 3 * taps] = True
    assert xx[spoiled].isnan().all()
    assert xv[spoiled].isnan().all()
    assert all(part.isfinite().all() for part in (xx[~spoiled][:, ~spoiled], xv[~spoiled], hh, hv, vv))


@every_set
@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("tridiagonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", EIGH, ids=str)
def test_eigh_in_lanes(case, dtype, tridiagonal):
    (a,), _ = case.arguments(dtype)
    a = a.reshape(-1, *a.shape[-2:])
    w, q = torch.ops.growkern_cpu.eigh_lanes(a, tridiagonal)
    assert_decomposes(a, w, q, EIGH_TOLERANCES[dtype])
    assert_same_values(w, torch.linalg.eigvalsh(a.double()), a, EIGH_TOLERANCES[dtype])


@every_set
@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5, 1e-9, 1e-20])
def test_small_entries_beside_large_neighbours_are_not_lost(dtype, size):
    """A reflection clears them however little they are of their row; a sum of squares no longer tells them apart."""
    g = torch.Generator().manual_seed(0)
    a = size * torch.randn(9, 30, 30, generator=g, dtype=dtype)
    a = (a + a.mT).index_fill(0, torch.arange(7, 9), 0)
    a.diagonal(1, 1, 2).add_(1)
    a.diagonal(-1, 1, 2).add_(1)
    w, q = torch.ops.growkern_cpu.eigh_lanes(a, True)
    assert_decomposes(a, w, q, EIGH_TOLERANCES[dtype])
    assert_same_values(w, torch.linalg.eigvalsh(a.double()), a, EIGH_TOLERANCES[dtype])


@every_set
@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("tridiagonal", [False, True])
def test_lanes_do_not_disturb_each_other(tridiagonal):
    a = torch.randn(37, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = a + a.mT
    a[3, 2, 1], a[20, 6, 6], a[36, 4, 0] = torch.nan, torch.inf, -torch.inf
    w, q = torch.ops.growkern_cpu.eigh_lanes(a, tridiagonal)
    bad = [3, 20, 36]
    good = [i for i in range(37) if i not in bad]
    assert w[bad].isnan().all()
    assert q[bad].isnan().all()
    assert_decomposes(a[good], w[good], q[good], EIGH_TOLERANCES[torch.float64])


@pytest.mark.parametrize("op", ["eigh", "svd"])
def test_slices_of_a_batch_equal_the_whole(op):
    a = torch.randn(3, 11, 30, 30, generator=torch.Generator().manual_seed(0))
    a = a + a.mT
    with use_backend("reference"):
        expected = getattr(ops, op)(a)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with use_backend("cpp"):
            out = getattr(ops, op)(a)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(out, expected, strict=True):
        assert torch.allclose(one.abs(), other.abs(), atol=1e-3)


def test_strides_beyond_two_to_the_31():
    """The tensor is virtual memory: only the pages of its three rows are ever touched."""
    far = 2**30 + 40
    x = torch.empty(2 * far + 5, dtype=torch.bfloat16).as_strided((3, 5), (far, 1))
    x.copy_(torch.arange(15).view(3, 5))
    maps = torch.empty(2 * far + 60, dtype=torch.bfloat16).as_strided((3, 4, 3, 5), (far, 15, 5, 1))
    maps.copy_(torch.arange(180).view(3, 4, 3, 5) % 7)
    geometry = ops.ConvGeometry(3, 1, 1)
    for arguments, options in (
        ((x, x, x), {}),
        ((maps, maps, maps), {"producer": geometry, "consumer": geometry}),
    ):
        function = ops.conv2d_moments if options else ops.linear_moments
        with use_backend("cpp"):
            out = function(*arguments, **options)
        with use_backend("reference"):
            expected = function(*(tensor.double() for tensor in arguments), **options)
        assert all(error(one, other) < 1e-6 for one, other in zip(out, expected, strict=True))


MEMORY = """
import sys, torch
from growkern import ops
def high():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
batch, channels, side = map(int, sys.argv[1:])
geometry = ops.ConvGeometry(3, 1, 1)
call = lambda maps: ops.conv2d_moments(*maps, producer=geometry, consumer=geometry)
call([torch.randn(1, channels, 4, 4)] * 3)
maps = [torch.randn(batch, channels, side, side) for _ in range(3)]
open("/proc/self/clear_refs", "w").write("5")
before = high()
out = call(maps)
sizes = sum(t.nbytes for t in out)
print((high() - before - sizes) / (sizes + sum(t.nbytes for t in maps)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
@pytest.mark.parametrize(("batch", "channels", "side"), [(256, 8, 32), (128, 64, 32), (64, 128, 8)])
def test_memory_beyond_inputs_and_outputs(batch, channels, side):
    command = [sys.executable, "-c", MEMORY, *map(str, (batch, channels, side))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) <= 1.5


def test_the_library_links_to_the_stable_interface_of_torch_2_11():
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    (library,) = PACKAGE.glob("_cpu.*")
    assert_stable(library, uses="torch_call_dispatcher")


def test_build_info_names_what_was_built():
    info = build_info()
    assert info is not None
    assert info["compiler"]
    assert "-O3" in info["flags"]
    assert "portable" in info["instruction_sets"]


def test_without_the_library_the_first_op_says_once_how_to_build_it(monkeypatch, caplog):
    only = {"reference": backend._implementations["eigh"]["reference"]}
    monkeypatch.setitem(backend._implementations, "eigh", only)
    backend._mention_missing_kernels.cache_clear()
    with caplog.at_level(logging.WARNING, logger="growkern"):
        ops.eigh(torch.eye(2))
        ops.eigh(torch.eye(2))
    assert [record.message.count("pip install --no-build-isolation") for record in caplog.records] == [1]


def test_auto_passes_over_backends_of_other_devices():
    chosen = backend.implementation("eigh", "cuda")
    assert chosen is not backend._implementations["eigh"]["cpp"]
    assert backend.implementation("eigh", "cpu") is backend._implementations["eigh"]["cpp"]
    with (
        use_backend("cpp"),
        pytest.raises(RuntimeError, match="eigh: cpp takes cpu tensors, got one on cuda"),
    ):
        backend.implementation("eigh", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "size"), [(20, 4), (5, 9)])
@pytest.mark.parametrize("kernel", ["full", "center"])
def test_taps_that_read_zeros_only_leave_no_rounding(kernel, channels, size, dtype):
    """Or whatever whitens it takes it for data, of another unit."""
    g = torch.Generator().manual_seed(0)
    x, h, v = (torch.randn(64, channels, size, size, generator=g).to(dtype) for _ in range(3))
    for maps in (x, h):
        maps[:, 1, :, :-1] = 0
        maps[:, 2, 1:] = 0
        maps[:, 3, :-1] = maps[:, 3, :, :-1] = 0
    three = ConvGeometry(3, padding=1)
    uniform = Call(x, x[:, :0], x[:, :0], three, ConvGeometry(1), x_bias=True)
    calls = [Call(x, h, v, three, three, kernel, h_bias=True), uniform]
    found = [dict(zip(NAMES, six, strict=True)) for six in grouped_moments(calls)]
    with use_backend("reference"):
        exact = [dict(zip(NAMES, six, strict=True)) for six in grouped_moments(calls)]
    for one, other in zip(found, exact, strict=True):
        for square, beside in (("xx", ("xh", "xv")), ("hh", ("hv",))):
            unread = other[square].diagonal() == 0
            assert unread.sum() == (11 if len(other[square]) else 0)
            assert not any(one[name][unread].any() for name in (square, *beside))
            assert not one[square][:, unread].any()
