"""Where the amplitude of a growth step is sought."""

import math

import pytest
import torch
import torch.nn.functional as F
from relu_nets import batches, mlp

import growkern as gk
from growkern.amplitude import best_amplitude
from growkern.surgery import trial

GRID = [4.0**k for k in range(-2, 3)]


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


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("lowest", [0.02, 0.06, 0.3, 1.0, 1.7, 5.0, 11.0, 60.0])
def test_one_valley_is_searched_in_few_steps_and_as_well_as_on_the_whole_grid(lowest, sign):
    evaluated = []

    def loss(scale):
        evaluated.append(scale)
        return (scale - sign * lowest) ** 2

    best, found = best_amplitude(loss, lowest**2)
    whole = [sign * size for size in (*GRID, 1 / 64, 1 / 256)] if lowest < 1 / 32 else [sign * size for size in GRID]
    nearest = min(whole, key=lambda scale: (scale - sign * lowest) ** 2)
    wanted = min((nearest, nearest / 2, nearest * 2), key=lambda scale: (scale - sign * lowest) ** 2)
    assert (best, found) == (wanted, (wanted - sign * lowest) ** 2)
    assert len(evaluated) == len(set(evaluated))
    if sign > 0 and lowest > 1 / 32:
        assert len(evaluated) <= 6


def test_the_whole_grid_counts_before_growth_is_rejected():
    evaluated = []

    def flat(scale):
        evaluated.append(scale)
        return 1.0

    assert best_amplitude(flat, 1.0) == (0.0, 1.0)
    assert sorted(evaluated) == sorted(sign * size for sign in (1, -1) for size in (*GRID, 1 / 64, 1 / 256))
    for only in evaluated:
        assert best_amplitude(lambda scale: 1.0 - (scale == only), 1.0)[0] == only  # noqa: B023
        assert best_amplitude(lambda scale: 0.0 if scale == only else math.inf, 1.0)[0] == only  # noqa: B023
