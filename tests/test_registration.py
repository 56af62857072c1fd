"""The ops as torch.library sees them, and the choice of backend."""

import threading

import pytest
import torch
from cases import Case, cases
from processes import python

from growkern import backend, ops
from growkern.backend import available, register, use_backend
from growkern.ops import ConvGeometry

OPS = ("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual", "eigh", "svd")
REGISTERED = {
    "linear_moments": ("63 rows", "no bias", "strided", "no rows"),
    "linear_residual": ("63 rows", "no bias", "no draws"),
    "conv2d_moments": ("3×3-full", "3×3 channels_last-center", "consumer stride 2-full", "2×2 same-center"),
    "conv2d_residual": ("3×3-full", "no draws-center", "nothing square-full", "no images-full"),
    "eigh": ("1×1", "repeated", "0×0"),
    "svd": ("wide", "rank one", "no columns"),
}
CHOSEN = [case for op in OPS for case in cases(op) if case.name in REGISTERED[op]]
ONE_EACH = [next(case for case in CHOSEN if case.op == op) for op in OPS]


def positional(case: Case, dtype: torch.dtype) -> tuple:
    """Arguments in the order of the schema, as the wrapper passes them."""
    args, named = case.arguments(dtype)
    for name in ("producer", "consumer"):
        if name in named:
            named[name] = named[name].pack()
    schema = getattr(torch.ops.growkern, case.op).default._schema
    named.setdefault("precision", "ieee")
    return (*args, *(named[argument.name] for argument in schema.arguments[len(args) :]))


def test_the_table_has_every_chosen_row():
    assert len(CHOSEN) == sum(map(len, REGISTERED.values()))


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_opcheck(case):
    for dtype in case.dtypes:
        torch.library.opcheck(getattr(torch.ops.growkern, case.op).default, positional(case, dtype))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_compiled_whole_equals_eager(case, dynamic):
    args, named = case.arguments(torch.float32)
    torch._dynamo.reset()

    def double(*tensors):
        return [2 * result for result in case.function(*tensors, **named)]

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tensors in (args, [tensor.clone().requires_grad_() for tensor in args]):
        out = compiled(*tensors)
        assert not any(result.requires_grad for result in out)
        assert all(torch.equal(one, other) for one, other in zip(out, double(*args), strict=True))


def test_inductor_compiles_the_ops_and_the_geometry_with_them():
    torch._dynamo.reset()
    (x, h, v), _ = next(case for case in CHOSEN if case.op == "conv2d_moments").arguments(torch.float32)

    def spectrum(x, h, v):
        geometry = ConvGeometry(3, padding=1)
        return ops.eigh(ops.conv2d_moments(x, h, v, producer=geometry, consumer=geometry)[0])

    for out, expected in zip(torch.compile(spectrum, fullgraph=True)(x, h, v), spectrum(x, h, v), strict=True):
        assert torch.equal(out, expected)


@pytest.fixture
def _with_cpp(monkeypatch):
    """A second implementation of linear_moments, registered beside the reference for the time of a test."""
    implementations = dict(backend._implementations["linear_moments"])
    monkeypatch.setitem(backend._implementations, "linear_moments", implementations)

    @register("linear_moments", "cpp")
    def ones(x, h, v, x_bias, h_bias, precision):
        p, q, r = x.shape[1] + x_bias, h.shape[1] + h_bias, v.shape[1]
        return tuple(x.new_ones(shape) for shape in ((p, p), (p, q), (p, r), (q, q), (q, r), (r, r)))


def top_left() -> float:
    """0 from the reference, 1 from the second implementation."""
    return ops.linear_moments(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 1))[0][0, 0].item()


@pytest.mark.usefixtures("_with_cpp")
def test_backends_register_beside_each_other():
    assert available("linear_moments")[-2:] == ("cpp", "reference")
    assert top_left() == 1.0
    with use_backend("reference"):
        assert top_left() == 0.0
        with use_backend("cpp"):
            assert top_left() == 1.0
        with use_backend("auto"):
            assert top_left() == 1.0
        assert top_left() == 0.0
    assert top_left() == 1.0


@pytest.mark.usefixtures("_with_cpp")
def test_the_choice_outlives_errors_and_reaches_other_threads():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert top_left() == 1.0
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(top_left()))
        thread.start()
        thread.join()
    assert seen == [0.0]


@pytest.mark.usefixtures("_with_cpp")
def test_the_choice_is_not_traced():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.linear_moments(x, x, x)[0], fullgraph=True, backend="aot_eager")
    x = torch.zeros(2, 3)
    with use_backend("reference"):
        assert compiled(x)[0, 0] == 0
    with use_backend("cpp"):
        assert compiled(x)[0, 0] == 1


def test_a_backend_that_an_op_lacks_is_named(monkeypatch):
    implementations = {"reference": backend._implementations["linear_moments"]["reference"]}
    monkeypatch.setitem(backend._implementations, "linear_moments", implementations)
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"linear_moments has no cuda implementation here; available: .*reference"),
    ):
        top_left()


def test_unknown_backends_are_refused():
    expected = "expected one of auto, triton, cuda, cpp, reference, got 'opencl'"
    with pytest.raises(ValueError, match=f"use_backend: {expected}"), use_backend("opencl"):
        pass
    with pytest.raises(ValueError, match="backend: expected one of triton, cuda, cpp, reference, got 'auto'"):
        register("linear_moments", "auto")
    assert available("no such op") == ()


CALL = """
import torch
from growkern import backend, ops
try:
    ops.eigh(torch.eye(2))
    print("done")
except (RuntimeError, ValueError) as error:
    print(type(error).__name__, error)
with backend.use_backend("reference"):
    ops.eigh(torch.eye(2))
    print("done")
"""


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("reference", "done\ndone\n"),
        (
            "opencl",
            "ValueError GROWKERN_BACKEND: expected one of auto, triton, cuda, cpp, reference, got 'opencl'\ndone\n",
        ),
    ],
)
def test_the_environment_sets_the_default(value, printed):
    assert python("-c", CALL, GROWKERN_BACKEND=value) == printed


def test_the_environment_is_read_when_an_op_is_called(monkeypatch):
    monkeypatch.setenv("GROWKERN_BACKEND", "triton")
    if "triton" not in available("eigh"):
        with pytest.raises(RuntimeError, match="eigh has no triton implementation here"):
            ops.eigh(torch.eye(2))
    with use_backend("reference"):
        assert torch.equal(ops.eigh(torch.eye(2))[0], torch.ones(2))


def test_import_does_not_touch_cuda():
    code = """
import torch
def refuse(*args):
    raise AssertionError("CUDA was initialised")
torch.cuda._lazy_init = refuse
torch._C._cuda_init = refuse
import growkern, growkern.ops
print(torch.cuda.is_initialized())
"""
    assert python("-c", code) == "False\n"
