"""Optimizer state grows with the parameters and trains on, or is refused."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, close, picture
from growth import corner, new_for, plain, train
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

import growkern as gk

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.05),
    "sgd momentum": lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, 0.01),
    "amsgrad": lambda p: Adam(p, 0.01, amsgrad=True),
    "adam foreach": lambda p: Adam(p, 0.01, foreach=True),
    "adam fused": lambda p: Adam(p, 0.01, fused=True),
    "adamw": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: Adagrad(p, 0.05),
    "nadam": lambda p: NAdam(p, 0.01),
    "radam": lambda p: RAdam(p, 0.01),
    "adamax": lambda p: Adamax(p, 0.01),
    "adadelta": lambda p: Adadelta(p, 1.0),
    "rprop": lambda p: Rprop(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_grows_with_the_parameters(name: str) -> None:
    model, x, target = plain()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, target, 3)
    new = new_for(model, x, target)
    params = list(model.parameters())
    old = copy.deepcopy([dict(optimizer.state.get(p, {})) for p in params])
    untouched = {p: dict(optimizer.state.get(p, {})) for p in params[3:]}
    gk.apply(model, new, optimizer=optimizer)

    grown = list(model.parameters())
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in grown]
    assert {id(p) for p in optimizer.state} <= {id(p) for p in grown}
    for p, before in zip(grown, old, strict=True):
        state = optimizer.state.get(p, {})
        assert state.keys() == before.keys()
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == p.shape
                leading, rest = corner(value, before[key])
                assert torch.equal(leading, before[key])
                assert not rest.any()
            else:
                assert value == before[key]
    for p, state in untouched.items():
        assert any(p is now for now in grown), "a parameter was replaced for no reason"
        assert all(optimizer.state[p][key] is value for key, value in state.items())

    before = [p.detach().clone() for p in grown]
    train(model, optimizer, x, target, 1)
    for now, then, first in list(zip(grown, before, params, strict=True))[:3]:  # producer, and consumer's weight
        assert corner(now - then, first)[1].any(), "new entries do not learn"
        for key, value in optimizer.state.get(now, {}).items():
            if isinstance(value, Tensor) and value.dim():
                assert corner(value, first)[1].any(), key


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dead_units_leave_training_as_it_was(name: str, steps: int) -> None:
    """With α = ω = 0 behind a ReLU nothing ever moves in the new entries, and the old ones train on as before."""
    model, x, target = plain()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, target, steps)
    alone = copy.deepcopy(model)
    other = OPTIMIZERS[name](alone.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    new = new_for(model, x, target)
    gk.apply(model, dataclasses.replace(new, alpha=0 * new.alpha, omega=0 * new.omega), optimizer=optimizer)
    train(model, optimizer, x, target, 3)
    train(alone, other, x, target, 3)
    for grown, p in zip(model.parameters(), alone.parameters(), strict=True):
        leading, rest = corner(grown, p)
        close(leading, p, 1e-9)
        assert not rest.any()


def test_parameter_groups_keep_their_order_and_settings() -> None:
    model, x, target = plain()
    named = [
        {"params": [("c", model[4].weight), ("a", model[0].weight)], "lr": 0.1},
        {"params": [("b", model[2].weight), ("ab", model[0].bias), ("bb", model[2].bias)], "momentum": 0.5},
    ]
    optimizer = SGD(named, 0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, x, target, 1)
    groups = list(optimizer.param_groups)
    settings = [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in groups]
    gk.apply(model, new_for(model, x, target), optimizer=optimizer)
    expected = [[model[4].weight, model[0].weight], [model[2].weight, model[0].bias, model[2].bias]]
    for group, now, params, old in zip(groups, optimizer.param_groups, expected, settings, strict=True):
        assert now is group, "schedulers hold on to the groups"
        assert [id(p) for p in now["params"]] == [id(p) for p in params]
        assert {k: v for k, v in now.items() if k != "params"} == old
    train(model, optimizer, x, target, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.001])


def test_optimizer_of_the_state_dict() -> None:
    """A state dict taken after growth loads into a fresh optimizer, which then steps identically."""
    model, x, target = plain()
    optimizer = Adam(model.parameters(), 0.01)
    train(model, optimizer, x, target, 2)
    gk.apply(model, new_for(model, x, target), optimizer=optimizer)
    twin = copy.deepcopy(model)
    other = Adam(twin.parameters(), 0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, x, target, 2)
    train(twin, other, x, target, 2)
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


class Factored(Optimizer):
    """Keeps one number per row of a weight."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["row"] = p.grad.flatten(1).square().sum(1) if p.dim() > 1 else p.grad.clone()


@pytest.mark.parametrize("site", ["0", "2"])
@pytest.mark.parametrize("make", [Factored, Adafactor], ids=["rows", "adafactor"])
def test_factored_state_is_refused(make: Callable[[Any], Optimizer], site: str) -> None:
    model, x, target = plain()
    optimizer = make(model.parameters())
    train(model, optimizer, x, target, 2)
    new = new_for(model, x, target, site)
    before = picture(model, optimizer)
    with pytest.raises(ValueError, match=rf"optimizer: {type(optimizer).__name__}"):
        gk.apply(model, new, optimizer=optimizer)
    assert_same(before, picture(model, optimizer))


def test_adafactor_before_its_first_step_grows() -> None:
    model, x, target = plain()
    optimizer = Adafactor(model.parameters())
    gk.apply(model, new_for(model, x, target), optimizer=optimizer)
    grown = model[0].weight.detach().clone()
    train(model, optimizer, x, target, 2)
    assert ((model[0].weight - grown)[5:].abs().sum(1) > 0).all()


@pytest.mark.parametrize("site", ["0", "2"])
@pytest.mark.parametrize("steps", [0, 2])
def test_lbfgs_is_refused_or_goes_on_with_the_new_parameters(steps: int, site: str) -> None:
    """It holds a list of its own, of the parameters, and flat histories of all of them together."""
    model, x, target = plain()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    new = new_for(model, x, target, site)
    before = picture(model, optimizer)
    refused = ""
    try:
        gk.apply(model, new, optimizer=optimizer)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("optimizer:")
        assert_same(before, picture(model, optimizer))
    else:
        grown = [p.detach().clone() for p in model.parameters()]
        optimizer.step(closure)
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), grown, strict=True))


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh gradients", "carried gradients"])
def test_fused_adam_on_channels_last(fresh: bool) -> None:
    """Fused kernels walk parameter, gradient and state in memory order: all three need one format."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.to(memory_format=torch.channels_last)
    x, target = torch.randn(20, 3, 8, 8).to(memory_format=torch.channels_last), torch.randint(5, (20,))
    results = []
    for fused in (False, True):
        twin = copy.deepcopy(model)
        optimizer = Adam(twin.parameters(), 0.01, fused=fused, foreach=False)
        train(twin, optimizer, x, target, 2)
        gk.apply(twin, new_for(twin, x, target), optimizer=optimizer)
        if fresh:
            train(twin, optimizer, x, target, 2)
        else:
            optimizer.step()
        results.append(dict(twin.named_parameters()))
    for name, p in results[0].items():
        close(results[1][name], p, 1e-4)


def test_parameters_of_another_optimizer_are_not_lost_without_a_word() -> None:
    model, x, target = plain()
    new = new_for(model, x, target)
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"it does not hold 2\.weight, which larger ones replace"):
        gk.apply(model, new, optimizer=optimizer)
    model[2].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.apply(model, new_for(model, x, target, "0"), optimizer=optimizer)
