"""Moments inside graphs, compiled functions and groups on a GPU."""

import pytest
import torch
from cases import TOLERANCES, cases, error

from growkern import ops
from growkern.backend import DEVICES, available, use_backend
from growkern.ops.moments import Call, grouped_moments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SAMPLES = [case for case in cases("linear_moments", "conv2d_moments") if case.name in ("no bias", "3×3-full")]
BACKENDS = [each for each in available("linear_moments") if "cuda" in DEVICES.get(each, ())]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_sample = pytest.mark.parametrize("case", SAMPLES, ids=str)


@each_backend
@each_sample
def test_a_captured_graph_replays_on_new_values(case, backend):
    args, named = case.arguments(torch.float32, device="cuda")
    with use_backend(backend):
        case.function(*args, **named)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case.function(*args, **named)
        later, _ = case.arguments(torch.float32, seed=5, device="cuda")
        for held, new in zip(args, later, strict=True):
            held.copy_(new)
        graph.replay()
        expected = case.function(*later, **named)
    assert all(torch.equal(one, other) for one, other in zip(out, expected, strict=True))


@each_backend
def test_a_graph_of_new_shapes_is_refused(backend):
    x = torch.randn(41, 7, device="cuda")
    torch.cuda.synchronize()
    with use_backend(backend), pytest.raises(RuntimeError, match="before capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ops.linear_moments(x, x, x)


@each_backend
@each_sample
def test_a_compiled_function_gives_the_same(case, backend):
    args, named = case.arguments(torch.float32, device="cuda")
    with use_backend(backend):
        expected = case.function(*args, **named)
        out = torch.compile(lambda *tensors: case.function(*tensors, **named), fullgraph=True)(*args)
    assert all(torch.equal(one, other) for one, other in zip(out, expected, strict=True))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sites_of_a_group_get_what_they_get_alone(backend, dtype):
    calls, right = [], []
    for case in cases("linear_moments", "conv2d_moments"):
        if dtype not in case.dtypes:
            continue
        (x, h, v), named = case.arguments(dtype, seed=3, device="cuda")
        calls.append(Call(x, h, v, **named))
        with use_backend("reference"):
            right.append(case.function(x.double(), h.double(), v.double(), **named))
    with use_backend(backend):
        out = grouped_moments(calls)
    for sums, expected in zip(out, right, strict=True):
        for one, other in zip(sums, expected, strict=True):
            assert error(one, other) <= TOLERANCES[dtype]
