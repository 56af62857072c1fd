"""What grown parameters carry on: gradients, attributes, freezing, memory format, dtype and ties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, assert_same, close, picture
from growth import corner, new_for, plain, rows
from torch import nn
from torch.optim import SGD

import growkern as gk

pytestmark = pytest.mark.usefixtures("one_thread")


def test_frozen_parameters_stay_frozen() -> None:
    model, x, target = plain()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    gk.apply(model, new_for(model, x, target), update=True)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False, True, True]


def test_gradients_are_carried() -> None:
    model, x, target = plain()
    F.cross_entropy(model(x), target).backward()
    model[0].bias.grad = None
    old = [p.grad for p in model.parameters()]
    gk.apply(model, new_for(model, x, target))
    for p, grad in zip(model.parameters(), old, strict=True):
        if grad is None:
            assert p.grad is None
        else:
            leading, rest = corner(p.grad, grad)
            assert torch.equal(leading, grad)
            assert not rest.any()


def test_attributes_of_parameters_are_kept() -> None:
    """Training recipes mark parameters, as in `p.no_weight_decay = True`."""
    model, x, target = plain()
    for p in model.parameters():
        p.no_weight_decay = p.dim() == 1
    gk.apply(model, new_for(model, x, target))
    assert [p.no_weight_decay for p in model.parameters()] == [p.dim() == 1 for p in model.parameters()]


def test_hooks_of_parameters_are_kept_and_can_still_be_removed() -> None:
    model, x, target = plain()
    weight, seen = model[0].weight, []
    weight.register_hook(lambda gradient: gradient * 0)
    handle = weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
    gk.apply(model, new_for(model, x, target))
    F.cross_entropy(model(x), target).backward()
    assert not model[0].weight.grad.any()
    assert model[2].weight.grad.any()
    assert seen == [model[0].weight.shape]
    handle.remove()
    F.cross_entropy(model(x), target).backward()
    assert len(seen) == 1


@pytest.mark.parametrize("update", [False, True])
def test_channels_last_is_kept(update: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)
    (site,) = gk.find_sites(model, x)
    new = gk.solve(gk.collect(model, [site], [(x, None)], lambda y, _: y.square().mean())["0"], neurons=2)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    gk.apply(model, new, update=update, optimizer=optimizer)
    for layer in (model[0], model[2]):
        state = optimizer.state[layer.weight]["momentum_buffer"]
        for name, tensor in (("weight", layer.weight), ("grad", layer.weight.grad), ("state", state)):
            assert tensor.is_contiguous(memory_format=torch.channels_last), name
            assert not tensor.is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).to(dtype)
    x = torch.randn(40, 6, dtype=dtype)
    (site,) = gk.find_sites(model, x)
    moments = gk.collect(model, [site], [(x, None)], lambda y, _: y.float().square().mean())
    assert {t.dtype for key, t in moments["0"].tensors().items() if key != "update"} == {torch.float32}
    new = gk.solve(moments["0"], neurons=2)
    old = model(x)
    expected = old.double() + 0.5 * F.relu(rows(x.double(), model[0]) @ new.alpha.T) @ new.omega.T
    gk.apply(model, new, scale=0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    close(model(x), expected, 0.03)


def test_tied_bias_stays_tied_or_is_refused() -> None:
    """Otherwise the other holder of the bias falls out of the optimizer without a word."""
    model, x, target = plain()
    model.append(nn.ReLU())
    tied = nn.Linear(CLASSES, 5).double()
    model.append(tied)
    new = new_for(model[:5], x, target)
    tied.bias = model[0].bias
    optimizer = SGD(model.parameters(), 0.1)
    before = picture(model, optimizer)
    with pytest.raises(ValueError, match="bias"):
        gk.apply(model, new, optimizer=optimizer)
    assert_same(before, picture(model, optimizer))
