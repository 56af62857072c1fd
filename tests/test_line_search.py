"""On which side of zero the amplitude of a growth step is sought."""

import pytest
import torch
import torch.nn.functional as F
from relu_nets import batches, mlp

import growkern as gk
from growkern.surgery import trial


@pytest.mark.parametrize("side", [1, -1])
def test_amplitudes_below_zero_are_for_when_none_above_lowers_the_loss(side, monkeypatch):
    torch.manual_seed(0)
    model, data = mlp(), batches()
    evaluated = []

    def mirrored(model, new, *, scale, update):
        evaluated.append(scale)
        return trial(model, new, scale=side * scale, update=update)

    monkeypatch.setattr("growkern.grower.trial", mirrored)
    event = gk.Grower(model, None, F.mse_loss, neurons=2).step(data)
    assert event.accepted
    assert event.scale * side > 0
    assert all(scale * side > 0 for scale in evaluated[-2:])  # around the best
    assert (min(evaluated) < 0) == (side < 0)
    assert event.loss_after < event.loss_before
