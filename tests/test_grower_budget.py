"""Budgets of parameters and units: never exceeded, and no site is measured for which they leave no room."""

import copy

import torch
import torch.nn.functional as F
from relu_nets import batches, mlp
from torch import nn

import growkern as gk


def test_budget():
    model, data = mlp(), batches()
    size = sum(p.numel() for p in model.parameters())
    grower = gk.Grower(model, None, F.mse_loss, neurons=4, max_parameters=size + 30)
    for _ in range(4):
        event = grower.step(data)
        assert sum(p.numel() for p in model.parameters()) <= size + 30
    assert sum(p.numel() for p in model.parameters()) > size
    assert not event.accepted
    assert "budget" in event.reason
    assert event.bottlenecks == {}
    assert event.loss_before == event.loss_after > 0
    assert gk.Grower(mlp(), None, F.mse_loss, neurons=4, max_neurons=1).step(data).neurons == 1


def test_only_sites_that_the_budget_leaves_room_at_are_measured():
    model = nn.Sequential(nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4))
    data = [(torch.randn(50, 12), torch.randn(50, 4)) for _ in range(2)]
    size = sum(p.numel() for p in model.parameters())
    units = [12 + 1 + 3, 3 + 1 + 4]  # parameters of one more unit at either site
    for room, measured in ((units[0], {"0", "2"}), (units[0] - 1, {"2"}), (units[1], {"2"}), (units[1] - 1, set())):
        grower = gk.Grower(copy.deepcopy(model), None, F.mse_loss, neurons=4, max_parameters=size + room)
        event = grower.step(data)
        assert event.bottlenecks.keys() == measured
        assert ("budget" in event.reason) == (not measured)
    pairs = gk.Grower(model, None, F.mse_loss, neurons=2, paired=True, max_parameters=size + 2 * units[1] - 1)
    assert "budget" in pairs.step(data).reason
