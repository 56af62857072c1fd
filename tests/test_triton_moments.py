"""The Triton kernels of the moments where there is no GPU: interpreted on the CPU, and compiled for others."""

import importlib
from dataclasses import replace

import pytest
import torch
from cases import TOLERANCES, cases, error, to_double
from processes import HAS_TRITON, needs_interpreter, python

from growkern.backend import INTERPRETED, use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, Residual, gpu, grouped_moments, grouped_residuals, schedule, turns
from growkern.ops.moments.schedule import Tiles

OPS = ("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual")

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

# Every layout, dtype and border; few large kernels, as the interpreter takes 10 ms for one program.
CHOSEN = (
    "linear or moments-3xd73-full-torch.float32 or last-center-torch.bfloat16 or strided-center or beyond"
    " or square-center or (then and full) or (of and center) or images or xd71-center or first or xd72"
    " or draws-center".replace("xd7", "\\xd7")
)


@needs_interpreter
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_cases_of_the_table_in_the_interpreter():
    here = ("tests/test_ops_moments.py", "tests/test_triton_moments.py")
    tests = python("-m", "pytest", "-q", *here, "-k", f"(triton and ({CHOSEN})) or interpreted", TRITON_INTERPRET="1")
    assert "conv2d_moments: has triton" in tests
    assert "skipped" not in tests


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_the_kernels_compile_without_spills_and_with_matrix_instructions():
    """bench/compiled.py fails on a kernel that spills, takes too much shared memory or multiplies by hand."""
    rows = python("bench/compiled.py", "--only", "64ch 32² B=128-full", "width 32").splitlines()
    kernels = {tuple(row.split()[:2]) for row in rows}
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    names = ("correlate", "assemble", "reduce", "combine", "subtract", "subtract_group", "pack")
    assert kernels == {(k, t) for k in names for t in targets}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_kernels_compiled_ahead_are_those_that_are_launched(tmp_path):
    """A launch of the same case finds all of them in the cache."""
    ahead = """
import sys
sys.path[:0] = ["bench", "tests"]
import compiled, torch, triton, warm
triton.runtime.driver.set_active(compiled.Elsewhere(compiled.TARGETS["sm_90"]))
torch.cuda.get_device_capability = lambda: (9, 0)
warm.tiles.gpu_of = lambda device: ("", "capability 9")
(case,) = [case for case in warm.cases("linear_moments") if case.name == "no bias"]
launched = warm.partial(compiled.launched, case, torch.bfloat16, "ieee")
warm._tasks[:] = [launched, next(warm.of_tuning([16]))]
found = [warm.run(number) for number in (0, 1)]
assert all(kinds and not failed for kinds, failed in found), found
def compiled_again(*given, **named):
    raise AssertionError("not in the cache")
triton.backends.nvidia.compiler.CUDABackend.make_ttir = compiled_again
for launch in launched("sm_90"):
    launch[0].device_caches.clear()
    compiled.built(launch)
print("none")
"""
    assert python("-c", ahead, TRITON_CACHE_DIR=str(tmp_path)) == "none\n"


# Inside the interpreter.

interpreted = pytest.mark.skipif(not INTERPRETED, reason="only in the interpreter, in a process of its own")
SAMPLES = [case for case in cases(*OPS) if case.name in ("no bias", "1×1-center", "stride beyond kernel-full")]


def run(case, precision="ieee"):
    arguments, named = case.arguments(torch.float32, seed=2)
    with use_backend("triton"):
        return case.function(*arguments, **named, precision=precision)


def expected(case):
    arguments, named = to_double(case.arguments(torch.float32, seed=2))
    with use_backend("reference"):
        return case.function(*arguments, **named)


@pytest.fixture
def many_splits(monkeypatch):
    """Splits of 32 positions at least, as many as 50 programs call for."""
    schedule.schedule.cache_clear()
    monkeypatch.setattr(turns, "SHORTEST", 32)
    monkeypatch.setattr(gpu, "processors_of", lambda device: 50)
    yield
    schedule.schedule.cache_clear()


@interpreted
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_interpreted_splits_are_added_up_in_one_order(case, many_splits):
    one, other = run(case), run(case)
    for first, second, right in zip(one, other, expected(case), strict=True):
        assert torch.equal(first, second)
        assert error(first, right) <= TOLERANCES[torch.float32]


@interpreted
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_interpreted_offsets_of_64_bits_change_nothing(case, monkeypatch):
    from growkern.ops.moments import triton

    narrow = run(case)
    monkeypatch.setattr(triton, "_wide", lambda *sides: True)
    assert all(torch.equal(*pair) for pair in zip(narrow, run(case), strict=True))


@interpreted
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_interpreted_tiles_need_not_be_square(case, monkeypatch):
    from growkern.ops.moments import triton

    monkeypatch.setattr(triton, "tiles", lambda *arguments: Tiles(32, 16, 16, 1))
    for one, right in zip(run(case), expected(case), strict=True):
        assert error(one, right) <= TOLERANCES[torch.float32]


@interpreted
@pytest.mark.parametrize(
    ("op", "shifts", "name"),
    [
        ("conv2d_residual", 2, "3×3-center"),
        ("conv2d_residual", 4, "5×5-full"),
        ("conv2d_moments", 4, "3×3 no bias-full"),
    ],
)
def test_interpreted_shifts_may_share_a_tile_of_u(op, shifts, name, monkeypatch, many_splits):
    from growkern.ops.moments import triton

    case = next(case for case in cases(op) if case.name == name)
    monkeypatch.setattr(triton, "tiles", lambda *arguments: Tiles(16, 16, 32, 1, shifts=shifts))
    launches = []
    kernel = importlib.import_module("growkern.ops.moments._triton").correlate_kernel
    monkeypatch.setattr("growkern.ops.moments._triton.correlate_kernel", Counted(kernel, launches))
    for one, right in zip(run(case), expected(case), strict=True):
        assert error(one, right) <= TOLERANCES[torch.float32]
    assert len(launches) == 2  # of several shifts, and of what is left


@interpreted
def test_interpreted_narrow_sides_have_tiles_of_their_own(monkeypatch):
    from growkern.ops.moments import triton

    case = next(case for case in cases("conv2d_moments") if case.name == "1×1-center")
    case = replace(case, channels=(3, 40, 33))
    monkeypatch.setattr(triton, "tiles", lambda *arguments: Tiles(32, 32, 32, 4))
    launches = []
    kernel = importlib.import_module("growkern.ops.moments._triton").correlate_kernel
    monkeypatch.setattr("growkern.ops.moments._triton.correlate_kernel", Counted(kernel, launches))
    for one, right in zip(run(case), expected(case), strict=True):
        assert error(one, right) <= TOLERANCES[torch.float32]
    assert len(launches) > 1


@interpreted
@pytest.mark.parametrize("case", SAMPLES[::2], ids=str)
def test_interpreted_tf32_is_the_same_sum(case):
    """The interpreter multiplies in float32 whatever it is asked for, so only the way of the data differs."""
    for one, right in zip(run(case, "tf32"), expected(case), strict=True):
        assert error(one, right) <= TOLERANCES[torch.float32]


@interpreted
@pytest.mark.parametrize("name", ["1×1-center", "runs"])
def test_interpreted_images_and_runs_in_chunks_add_up(name, monkeypatch):
    case = next(case for case in cases("conv2d_residual", "linear_residual") if case.name == name)
    whole = run(case)
    monkeypatch.setattr(gpu, "APART_BYTES", 1)
    for one, other in zip(whole, run(case), strict=True):
        assert error(one, other.double()) <= TOLERANCES[torch.float32]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_sites_of_a_group_get_what_they_get_alone(dtype):
    """Matrices and maps, NCHW, channels_last and strided, with and without room to fill up, of several widths."""
    names = ("no bias", "strided", "1×1-full", "1×1-center", "3×3 then 1×1-full", "no images-full", "no draws-full")
    chosen = [case for case in cases("linear_moments", "conv2d_moments") if case.name in names]
    chosen.append(replace(chosen[2], layout="channels_last", channels=(8, 16, 40)))
    assert len(chosen) == len(names) + 1
    calls = []
    for case in chosen:
        (x, h, v), named = case.arguments(dtype, seed=3)
        calls.append(Call(x, h, v, **named))
    with use_backend("triton"):
        out = grouped_moments(calls)
    with use_backend("reference"):
        right = grouped_moments([double(call) for call in calls])
    for case, sums, expected_sums in zip(chosen, out, right, strict=True):
        for one, other in zip(sums, expected_sums, strict=True):
            assert error(one, other) <= TOLERANCES[dtype], case


def residual_calls(dtype):
    """Residuals with more positions to an image, or rows to a sign, than draws and with fewer; none; whole maps."""
    names = ("strided", "1×1-full", "1×1-center", "no images-full", "whole map-full", "strided runs", "runs")
    names += ("a run beyond the rows", "no draws")
    chosen = [case for case in cases("linear_residual", "conv2d_residual") if case.name in names]
    assert len(chosen) == len(names)
    few = next(case for case in chosen if case.name == "1×1-full")
    chosen.append(replace(few, name="", layout="channels_last", channels=(8, 16, 40), maps=(2, 1), draws=5))
    chosen.append(replace(few, name="", h_bias=False, kernel="center", draws=40))
    calls = []
    for case in chosen:
        (x, h, v, update), named = case.arguments(dtype, seed=4)
        signs, run = named.pop("signs"), named.pop("rows_per_sign", 1)
        if case.name == "strided":
            update, signs = update.double(), signs.double().mT.contiguous().mT
        calls.append(Residual(Call(x, h, v, **named), update, signs, run))
    return calls


def double(call):
    if isinstance(call, Residual):
        return Residual(double(call.call), call.update.double(), call.signs.double(), call.rows_per_sign)
    return call._replace(x=call.x.double(), h=call.h.double(), v=call.v.double())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_residuals_of_a_group_get_what_they_get_alone(dtype):
    calls = residual_calls(dtype)
    with use_backend("reference"):
        right = grouped_residuals([double(call) for call in calls])
    with use_backend("triton"):
        out = grouped_residuals(calls)
    for sums, expected_sums in zip(out, right, strict=True):
        for one, other in zip(sums, expected_sums, strict=True):
            assert error(one, other) <= TOLERANCES[dtype]


@interpreted
@pytest.mark.parametrize(("draws", "most"), [(None, 4), (0, 6), (3, 6), (5, 7)])
def test_interpreted_groups_take_a_handful_of_launches(draws, most, monkeypatch):
    from growkern.ops.moments import _triton

    launches = []
    for name in ("pack", "subtract_group", "correlate", "reduce", "combine", "assemble"):
        kernel = getattr(_triton, f"{name}_kernel")
        monkeypatch.setattr(_triton, f"{name}_kernel", Counted(kernel, launches))
    calls = [Call(*torch.randn(3, 20, 8, 1, 5).unbind(), ConvGeometry(1), ConvGeometry(1)) for _ in range(3)]
    with use_backend("triton"):
        if draws is None:
            grouped_moments(calls)
        else:
            signs = torch.ones(draws, 20) if draws else None
            grouped_residuals([Residual(call, torch.zeros(8, 8), signs) for call in calls])
    assert 3 <= len(launches) <= most


class Counted:
    """A kernel that notes its launches down."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]
