"""Neurons that do not fit the model are refused, and nothing changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same, picture
from growth import grown_already, new_for, plain
from torch import nn
from torch.optim import SGD

import growkern as gk
from growkern import GrowthSite, NewNeurons

pytestmark = pytest.mark.usefixtures("one_thread")


def grown_upstream() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "2")
    gk.apply(model, new_for(model, x, target, "0"))
    return model, new


def grown_downstream() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    gk.apply(model, new_for(model, x, target, "2"))
    return model, new


def other_layer() -> tuple[nn.Module, NewNeurons]:
    model, new = grown_already()
    model[2] = nn.Sequential(model[2])
    return model, new


def lost_bias() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    model[0].bias = None
    return model, new


def other_kernel() -> tuple[nn.Module, NewNeurons]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    new = new_for(model, torch.randn(20, 3, 8, 8), torch.randint(5, (20,)))
    model[2] = nn.Conv2d(4, 5, 5)
    return model, new


def wrong_name() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    return model, dataclasses.replace(new, site=GrowthSite("first", "2", ("1",)))


def norm_appeared() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    model[1] = nn.BatchNorm1d(5).double()
    return model, new


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (grown_upstream, "fan-in"),
        (grown_downstream, "fan-out of 7, but 2 now has 9"),
        (grown_already, "updates"),
        (other_layer, "2 is a Sequential"),
        (lost_bias, "fan-in"),
        (other_kernel, "fan-out"),
        (wrong_name, "first"),
        (norm_appeared, r"new: .*norm"),
    ],
)
def test_neurons_that_do_not_fit_change_nothing(
    build: Callable[[], tuple[nn.Module, NewNeurons]], message: str
) -> None:
    model, new = build()
    optimizer = SGD(model.parameters(), 0.1)
    before = picture(model, optimizer)
    with pytest.raises(ValueError, match=message):
        gk.apply(model, new, optimizer=optimizer)
    assert_same(before, picture(model, optimizer))


def test_what_is_no_neurons_or_no_optimizer_is_refused() -> None:
    model, x, target = plain()
    new = new_for(model, x, target)
    before = picture(model)
    for wrong, message in (({"0": new}, "new: expected NewNeurons, got dict"), (None, "new: expected NewNeurons")):
        with pytest.raises(ValueError, match=message):
            gk.apply(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer: expected Optimizer, got the class SGD"):
        gk.apply(model, new, optimizer=SGD)  # type: ignore[arg-type]
    assert_same(before, picture(model))
    with pytest.raises(ValueError, match="moments: expected Moments or a dict of them, got list"):
        gk.solve([])  # type: ignore[call-overload]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, "1", None])
def test_scale_must_be_finite(scale: Any) -> None:
    model, x, target = plain()
    new = new_for(model, x, target)
    before = picture(model)
    with pytest.raises(ValueError, match="scale"):
        gk.apply(model, new, scale=scale)
    assert_same(before, picture(model))
