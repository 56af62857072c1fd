"""A fresh model takes the widths of a grown one, and then its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, assert_same, close, picture

import growkern as gk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "bottleneck", "flatten", "transformer"])
def test_a_grown_state_loads_into_a_widened_model(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model, ((x, _),) = family.build(), family.batches(6)
    torch.manual_seed(1)
    fresh = family.build()
    sites = gk.find_sites(model, x)
    for site in sites:
        moments = gk.collect(model, [site], [(x, None)], lambda y, _: y.square().mean(), null_draws=0)
        gk.apply(model, gk.solve(moments[site.name], neurons=2, method="random"))
    widths = {site.name: len(model.get_submodule(site.producer).weight) for site in sites}
    before = fresh.eval()(x)
    gk.widen(fresh, sites, widths)
    close(fresh(x), before, 1e-5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model.eval()(x))


def test_the_optimizer_follows_and_unnamed_sites_stay() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)
    )
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(6, 4)
    F.mse_loss(model(x), torch.zeros(6, 2)).backward()
    optimizer.step()
    gk.widen(model, gk.find_sites(model, x), {"0": 7}, optimizer=optimizer)
    assert (model[0].out_features, model[2].in_features, model[2].out_features) == (7, 7, 5)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (7, 4)


def test_part_of_a_group_changes_nothing() -> None:
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 2, 1))
    sites = gk.find_sites(model, torch.randn(2, 3, 8, 8))
    before = picture(model)
    with pytest.raises(ValueError, match="'3' grows by multiples of 2 units"):
        gk.widen(model, sites, {"0": 6, "3": 7})
    assert_same(before, picture(model))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"9": 8}, "'9' is no site of the model; there are 0"),
        ({"0": 2}, "'0' has 3 units already"),
        ({"0": 7.5}, r"widths\['0'\]: expected an integer of 0 or more, got 7.5"),
        ({"0": None}, r"widths\['0'\]: expected an integer of 0 or more, got None"),
        ([8], "widths: expected units by name of site, got list"),
    ],
)
def test_wrong_widths_change_nothing(widths: Any, message: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    sites = gk.find_sites(model, torch.randn(2, 4))
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        gk.widen(model, sites, widths)
    assert_same(before, picture(model))


def test_an_averaged_copy_follows() -> None:
    """Copies of weights that training code keeps are widened like a fresh model, and average on."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).double()
    averaged, x = torch.optim.swa_utils.AveragedModel(model), torch.randn(30, 4, dtype=torch.float64)
    averaged.update_parameters(model)
    grower = gk.Grower(model, None, F.cross_entropy, neurons=2)
    event = grower.step([(x, torch.randint(2, (30,)))])
    assert event.accepted
    before = averaged(x)
    gk.widen(averaged.module, grower.sites, event.widths)
    torch.testing.assert_close(averaged(x), before, rtol=1e-12, atol=1e-12)
    averaged.update_parameters(model)
    new = averaged.module[0].weight[3:]
    torch.testing.assert_close(new, model[0].weight[3:] / 2, rtol=1e-12, atol=0)
