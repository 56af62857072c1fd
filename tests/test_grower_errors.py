"""What `Grower` refuses, at once or at its first step."""

import pytest
import torch
import torch.nn.functional as F
from relu_nets import batches, mlp
from torch import nn

import growkern as gk


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "best"}, "method: expected one of"),
        ({"where": "worst"}, "where: expected one of"),
        ({"when": "sometimes"}, "when: expected one of"),
        ({"cost": "time"}, "cost: expected one of"),
        ({"method": "random"}, "'random' has no directions"),
        ({"when": 5}, "when: expected"),
        ({"when": "pays", "method": "gradmax"}, "when: 'pays' compares"),
        ({"neurons": "atuo"}, "neurons: expected 'auto' or an integer"),
        ({"max_neurons": -3}, "max_neurons: expected an integer"),
        ({"kernel": "ful"}, "kernel: expected one of"),
        ({"reduction": "avg"}, "reduction: expected one of"),
        ({"null_draws": -1}, "null_draws: expected an integer"),
        ({"null_draws": 1}, "null_draws: 'auto' needs draws"),
        ({"held_out": 1.5}, "held_out: expected a share from 0 to 1, got 1.5"),
        ({"held_out": None}, "held_out: expected a share"),
        ({"max_parameters": "1000"}, "max_parameters: expected an integer of 0 or more, got '1000'"),
        ({"max_parameters": -1}, "max_parameters: expected an integer"),
        ({"sites": gk.GrowthSite("0", "3", ("1", "2"))}, "sites: expected a list of growth sites, got GrowthSite"),
        ({"optimizer": torch.optim.Adam}, "optimizer: expected Optimizer, got the class Adam"),
        ({"loss_fn": nn.MSELoss}, "loss_fn: expected a function .* got the class MSELoss"),
        ({"loss_fn": "mse"}, "loss_fn: expected a function .* got str"),
        ({"model": F.relu}, "model: expected Module, got function"),
    ],
)
def test_arguments_are_checked_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Grower(**({"model": mlp(), "optimizer": None, "loss_fn": F.mse_loss} | options))


def test_errors_of_a_step():
    data = batches()
    for look in (gk.Grower(nn.Linear(8, 4), None, F.mse_loss).step, lambda d: gk.bottlenecks(nn.Linear(8, 4), d, len)):
        with pytest.raises(ValueError, match="no site that can grow: no Linear or Conv2d alone reads"):
            look(data)
    smooth = nn.Sequential(nn.Linear(8, 3), nn.Sigmoid(), nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"no site that can grow: 0 -> 1 -> 2: the activation is 0\.5 at 0"):
        gk.Grower(smooth, None, F.mse_loss).step(data)
    for where in ("best", "all"):
        with pytest.raises(ValueError, match="sites: expected at least one"):
            gk.Grower(mlp(), None, F.mse_loss, sites=[], where=where).step(data)
    with pytest.raises(ValueError, match=r"batches: expected \(input, target\) pairs, got NoneType"):
        gk.Grower(mlp(), None, F.mse_loss).step(None)
    with pytest.raises(ValueError, match=r"batch_dim: expected a dimension of an input of shape \(100, 8\), got 2"):
        gk.Grower(mlp(), None, F.mse_loss, batch_dim=2).step(data)
    with pytest.raises(ValueError, match="state: expected what"):
        gk.Grower(mlp(), None, F.mse_loss).load_state_dict(mlp().state_dict())
    with pytest.raises(ValueError, match="at least one"):
        gk.Grower(mlp(), None, F.mse_loss).step([])
    with pytest.raises(ValueError, match="no parameters"):
        gk.Grower(nn.ReLU(), None, F.mse_loss).step(data)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        gk.Grower(mlp(), torch.optim.SGD(mlp().parameters(), 0.1), F.mse_loss, neurons=2).step(data)
    with pytest.raises(ValueError, match="at least one"):
        gk.bottlenecks(mlp(), [], F.mse_loss)
    with pytest.raises(ValueError, match="site 'missing'"):
        gk.Grower(mlp(), None, F.mse_loss, sites=[gk.GrowthSite("missing", "3")]).step(data)
