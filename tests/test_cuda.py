"""The method on a GPU: the same moments and neurons as on the CPU, and growth in place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growkern as gk
from growkern import backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")


@pytest.fixture(
    params=[b for b in backend.BACKENDS if "cuda" in backend.DEVICES.get(b, ()) or b == "reference"], autouse=True
)
def preferred(request, monkeypatch):
    """Let "auto" prefer each backend of the GPU in turn; ops that lack it take another."""
    if request.param not in backend.available("linear_moments"):
        pytest.skip(f"{request.param} is not here")
    others = [name for name in backend.BACKENDS if name != request.param]
    monkeypatch.setattr(backend, "BACKENDS", (request.param, *others))


def networks():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    cnn = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3)),
    )
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (96,), generator=g)
    return [(mlp, torch.randn(96, 12, generator=g), labels), (cnn, torch.randn(96, 3, 8, 8, generator=g), labels)]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_neurons_equal_those_of_the_cpu(which, dtype):
    model, x, y = networks()[which]
    model, x = model.to(dtype), x.to(dtype)
    sites = gk.find_sites(model, x)
    here = gk.collect(model, sites, [(x, y)], F.cross_entropy)
    there = gk.collect(copy.deepcopy(model).cuda(), sites, [(x, y)], F.cross_entropy)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    for name, moments in here.items():
        for key, tensor in moments.tensors().items():
            other = there[name].tensors()[key]
            assert other.is_cuda
            assert (other.cpu() - tensor).norm() <= tolerance * tensor.norm(), (name, key)
        a, b = gk.solve(moments, neurons=2), gk.solve(there[name], neurons=2)
        torch.testing.assert_close(b.singular_values.cpu(), a.singular_values, rtol=20 * tolerance, atol=0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_step_grows_in_place_and_restores_the_generator(which):
    model, x, y = networks()[which]
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = torch.cuda.get_rng_state()
    event = gk.Grower(model, optimizer, F.cross_entropy, neurons=2).step([(x, y)])
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert event.accepted
    assert event.loss_after < event.loss_before
    assert all(p.is_cuda for p in model.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < event.loss_after
