"""Models with new neurons for them, and how tests train and compare what has grown."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, F64, FAMILIES, SMALL
from torch import Tensor, nn
from torch.optim import Optimizer

import growkern as gk
from growkern import NewNeurons


def measured(name: str, site: str, neurons: int = 2, **options: Any) -> tuple[nn.Module, NewNeurons, list[Any]]:
    """A float64 model of a family with trained-looking norms, new neurons for one site, and the batches."""
    family = FAMILIES[name]
    model = lively(family.build().double())
    batches = family.batches(*((30, 20) if name in SMALL else (10, 4)), dtype=F64)
    sites = [s for s in gk.find_sites(model, batches[0][0]) if s.name == site]
    new = gk.solve(gk.collect(model, sites, batches, F.cross_entropy, null_draws=0, **options)[site], neurons=neurons)
    assert len(new) == neurons
    return model, new, batches


def lively(model: nn.Module) -> nn.Module:
    """Give norms weights and statistics of their own, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def drawn(new: NewNeurons, count: int = 3) -> NewNeurons:
    """Neurons of the same shapes with random weights, in no relation to the data."""
    p, outputs = new.alpha.shape[1], new.omega.shape[0]
    alpha, omega = torch.randn(count, p, dtype=F64), torch.randn(outputs, count, dtype=F64)
    update = torch.randn_like(new.best_update)
    values = torch.ones(count, dtype=F64)
    mean = None if new.mean is None else torch.randn(count, dtype=F64)
    variance = None if new.variance is None else torch.rand(count, dtype=F64) + 0.1
    return dataclasses.replace(
        new, alpha=alpha, omega=omega, best_update=update, singular_values=values, mean=mean, variance=variance
    )


def everywhere(names: list[Any]) -> list[Any]:
    """Every site of every family that is named."""
    params = []
    for each in names:
        name, marks = (each.values[0], each.marks) if not isinstance(each, str) else (each, ())
        params += [pytest.param(name, site, marks=marks, id=f"{name}-{site}") for site in FAMILIES[name].sites]
    return params


def rows(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if layer.bias is not None else x


def plain() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, CLASSES)).double()
    return model, torch.randn(40, 6, dtype=F64), torch.randint(CLASSES, (40,))


def grouped() -> tuple[nn.Module, NewNeurons, Tensor]:
    layers = nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 3)
    model = lively(nn.Sequential(*layers).double())
    x = torch.randn(20, 3, 8, 8, dtype=F64)
    moments = gk.collect(model, gk.find_sites(model, x), [(x, None)], lambda y, _: y.pow(4).mean(), null_draws=0)
    with pytest.raises(ValueError, match=r"'0'.*multiples of 2"):
        gk.solve(moments["0"], neurons=3)
    assert len(gk.solve(moments["0"], neurons=6, max_neurons=5)) == 4
    return model, gk.solve(moments["0"], neurons=4), x


def new_for(model: nn.Module, x: Tensor, target: Tensor, site: str = "0", neurons: int = 2) -> NewNeurons:
    sites = [s for s in gk.find_sites(model, x) if s.name == site]
    return gk.solve(gk.collect(model, sites, [(x, target)], F.cross_entropy, null_draws=0)[site], neurons=neurons)


def grown_already() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    gk.apply(model, new)
    return model, new


def train(model: nn.Module, optimizer: Optimizer, x: Tensor, target: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def corner(value: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The leading corner of a tensor, and all the rest of it in a row."""
    rest = torch.ones_like(value, dtype=torch.bool)
    at = tuple(slice(n) for n in old.shape)
    rest[at] = False
    return value[at].detach(), value[rest].detach()
