"""Widening layers: what the old function does, and what the new units add to it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, F64, SMALL, assert_same, close
from growth import drawn, everywhere, lively, measured, rows, train
from networks import patches
from torch import Tensor, nn
from torch.optim import Adam

import growkern as gk
from growkern import GrowthSite

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "site"), everywhere(ALL))
def test_scale_zero_preserves_the_function(name: str, site: str) -> None:
    model, new, batches = measured(name, site)
    x = batches[0][0]
    before = model.eval()(x)
    units = model.get_submodule(site).weight.shape[0]
    gk.apply(model, new, scale=0.0, update=True)
    assert (model(x) - before).abs().max() <= 1e-12
    assert model.get_submodule(site).weight.shape[0] == units + 2


def caught(model: nn.Module, site: GrowthSite, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input of the producer, input of the consumer, output of the consumer, in evaluation mode."""
    seen = {}
    producer, consumer = model.get_submodule(site.producer), model.get_submodule(site.consumer)
    handles = [
        producer.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].clone())),
        consumer.register_forward_hook(lambda m, a, z: seen.update(h=a[0].clone(), z=z.clone())),
    ]
    training = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(training)
    for handle in handles:
        handle.remove()
    return seen["x"], seen["h"], seen["z"]


def centre(hidden: Tensor, layer: nn.Conv2d, size: torch.Size) -> Tensor:
    """What the tap at k // 2 of a convolution reads of a hidden map, at each output; zero outside."""
    out = hidden.new_zeros(*hidden.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            at = [
                p * layer.stride[axis] - layer.padding[axis] + layer.dilation[axis] * (layer.kernel_size[axis] // 2)
                for axis, p in enumerate((i, j))
            ]
            if 0 <= at[0] < hidden.shape[2] and 0 <= at[1] < hidden.shape[3]:
                out[:, :, i, j] = hidden[:, :, at[0], at[1]]
    return out


SITES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), (6,), torch.tanh),
    "linear, no bias": (
        lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False)),
        (6,),
        F.relu,
    ),
    "linear, norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 4)),
        (6,),
        F.gelu,
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), (3, 6), F.relu),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)),
        (3, 7, 6),
        F.relu,
    ),
    "conv, strides": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, (3, 2), (2, 1), 1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 4, (3, 4), (1, 2), (2, 1), (2, 1)),
        ),
        (3, 9, 8),
        F.relu,
    ),
    "conv, pool": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, padding=1)),
        (3, 9, 9),
        lambda t: F.max_pool2d(F.relu(t), 2),
    ),
    "flatten": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(60, 4)),
        (3, 6, 8),
        lambda t: F.avg_pool2d(F.relu(t), (1, 2)),
    ),
}


@pytest.mark.parametrize("scale", [1.0, 0.49, -0.36])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, "full") for name in SITES), ("conv", "center"), ("conv, strides", "center")]
)
def test_new_units_add_what_their_formula_says(name: str, kernel: str, update: bool, scale: float) -> None:
    """The consumer's output grows by γ·dW*·h and by Σ σ(√|γ| α x)·(±√|γ| ω), both computed without the surgery."""
    build, sample, between = SITES[name]
    model = lively(build().double())
    x = torch.randn(6, *sample, dtype=F64)
    (site,) = gk.find_sites(model, x)
    moments = gk.collect(model, [site], [(x, None)], lambda y, _: y.square().mean(), kernel=kernel, null_draws=0)
    new = drawn(gk.solve(moments[site.name], neurons=1))
    seen, h, z = caught(model, site, x)
    producer, consumer = model.get_submodule(site.producer), model.get_submodule(site.consumer)
    alpha, omega = math.sqrt(abs(scale)) * new.alpha, math.copysign(math.sqrt(abs(scale)), scale) * new.omega

    old, r, count = consumer.weight.detach(), consumer.weight.shape[0], len(new)
    if isinstance(producer, nn.Linear):
        added = between(rows(seen, producer) @ alpha.T) @ omega.T
        reached = rows(h, consumer) @ new.best_update.T
    else:
        hidden = between(torch.einsum("bpij,kp->bkij", patches(seen, producer), alpha))
        if isinstance(consumer, nn.Linear):
            fan_out = omega.view(r, *hidden.shape[2:], count)
            added = torch.einsum("bkij,rijk->br", hidden, fan_out)
            reached = rows(h, consumer) @ new.best_update.T
        else:
            if kernel == "full":
                fan_out = omega.view(r, *consumer.kernel_size, count).permute(0, 3, 1, 2)
                added = F.conv2d(hidden, fan_out, None, consumer.stride, consumer.padding, consumer.dilation)
            else:
                added = torch.einsum("bkij,rk->brij", centre(hidden, consumer, z.shape[2:]), omega)
            reached = torch.einsum("bqij,rq->brij", patches(h, consumer), new.best_update)
    gk.apply(model, new, scale=scale, update=update)
    close(caught(model, site, x)[2], z + added + (scale * reached if update else 0))
    assert update or torch.equal(consumer.weight[:, : old.shape[1]], old)


@pytest.mark.parametrize(("name", "site"), everywhere(SMALL))
def test_old_entries_stay_in_the_leading_corner(name: str, site: str) -> None:
    model, new, _ = measured(name, site)
    old = {key: value.clone() for key, value in model.state_dict().items()}
    gk.apply(model, new, scale=0.7)
    for key, value in model.state_dict().items():
        assert torch.equal(value[tuple(slice(n) for n in old[key].shape)], old[key]), key


def test_modules_know_their_new_sizes() -> None:
    model, new, _ = measured("vgg", "0")
    gk.apply(model, new)
    assert (model[0].out_channels, model[1].num_features, model[4].in_channels) == (8, 8, 8)
    model, new, _ = measured("vgg", "4", 3)
    gk.apply(model, new)
    assert (model[4].out_channels, model[10].in_features) == (8, 72)
    model, new, _ = measured("vgg", "10", 3)
    gk.apply(model, new)
    assert (model[10].out_features, model[12].in_features) == (12, 12)


@pytest.mark.parametrize(("name", "site"), everywhere(SMALL))
def test_no_neurons_change_nothing(name: str, site: str) -> None:
    model, new, batches = measured(name, site)
    optimizer = Adam(model.parameters())
    old = {key: value.clone() for key, value in model.state_dict().items()}
    gk.apply(model, drawn(new, 0), optimizer=optimizer)
    assert_same(old, dict(model.state_dict()))
    train(model, optimizer, *batches[0], 1)
    assert not torch.equal(model.get_submodule(site).weight, old[f"{site}.weight"])
