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
        ({"held_out": 1.5}, "held_out: expected a share from 0 to 1, got 1.5"),
        ({"held_out": None}, "held_out: expected a share"),
    ],
)
def test_arguments_are_checked_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Grower(mlp(), None, F.mse_loss, **options)


def test_errors_of_a_step():
    data = batches()
    with pytest.raises(ValueError, match="no site that can grow"):
        gk.Grower(nn.Linear(8, 4), None, F.mse_loss).step(data)
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
