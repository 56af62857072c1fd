"""Trials grow a model as `apply` does, and bring everything back."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SMALL, assert_same, picture
from growth import everywhere, grouped, grown_already, measured, train
from torch.optim import Adam

import growkern as gk
from growkern.surgery import trial

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("fails", [False, True], ids=["", "exception"])
@pytest.mark.parametrize(("name", "site"), everywhere(SMALL))
def test_trial_brings_everything_back(name: str, site: str, fails: bool) -> None:
    model, new, batches = measured(name, site)
    optimizer = Adam(model.parameters())
    train(model, optimizer, *batches[0], 1)
    model.eval()
    expected = copy.deepcopy(model)
    gk.apply(expected, new, scale=-0.7, update=True)
    before = picture(model, optimizer)
    raised = False
    try:
        with trial(model, new, scale=-0.7, update=True):
            inside = model(batches[0][0])
            if fails:
                raise KeyError
    except KeyError:
        raised = True
    assert raised == fails
    assert torch.equal(inside, expected(batches[0][0]))
    assert_same(before, picture(model, optimizer))


def test_trial_of_a_group_norm() -> None:
    model, new, x = grouped()
    before = picture(model)
    with trial(model, new, scale=2.0):
        assert model[1].num_groups == 5
        model(x)
    assert_same(before, picture(model))


def test_trial_refuses_what_apply_refuses() -> None:
    model, new = grown_already()
    before = picture(model)
    with pytest.raises(ValueError, match="updates"), trial(model, new, scale=1.0):
        pass
    assert_same(before, picture(model))
