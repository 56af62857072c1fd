"""Whole growth steps of the bench suite: by hand, in gromo and in growkern they find the same."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import gromo_containers
import report
import steps
from pytorch_step import PyTorchStep


@pytest.mark.parametrize("case", steps.CASES["test"], ids=str)
def test_steps_find_the_same(case: steps.Case) -> None:
    torch.manual_seed(0)
    model, batches = steps.start(case, "cpu")
    sites = steps.sites_of(model, batches[0][0])
    single = steps.growkern(model, sites, batches, case.kernel)
    if case.network != "encoder":  # behind a layer norm moments are singular, and gromo's cut is its own
        pytest.importorskip("gromo", reason="gromo is not installed: pip install gromo==0.1.0")
        peer = gromo_containers.step(steps.container(case, model, "cpu"), batches, steps.NEURONS)
    else:
        peer = single
    model.double()
    batches = [(x.double(), y) for x, y in batches]
    by_hand = PyTorchStep(model, sites, case.kernel)
    wanted = [steps.Wanted(each) for each in by_hand.measured(batches)]
    own = steps.growkern(model, sites, batches, case.kernel)
    hand = by_hand(batches, steps.NEURONS)
    for site, found, other, rounded, theirs in zip(wanted, own, hand, single, peer, strict=True):
        assert site.missed(*found) < 1e-6
        assert site.missed(*other) < 1e-6
        assert site.missed(*rounded) < 1e-3
        assert site.missed(*theirs) < 3e-2
        alpha, omega, update = found
        assert site.missed(-2 * alpha, omega, update / 2) < 1e-6  # the scale of v is a convention
        for wrong in (
            (alpha.flip(0), omega, update),
            (alpha, omega, update.roll(1, 0)),
            (alpha[1:], omega[:, 1:], update),
        ):
            assert site.missed(*wrong) > 0.05


def test_tables_of_steps() -> None:
    def way(name: str, kind: str, ms: float, **over: list[float]) -> dict[str, Any]:
        return {"way": name, "kind": kind, "ms": ms, "MiB": ms / 10, "over": over}

    described = {"case": "net", "dtype": "float32", "precision": "ieee"}
    ways = [way("growkern", "growkern", 100, PyTorch=[2, 1, 3], gromo=[50, 40, 60]), way("PyTorch", "pytorch", 200)]
    ways += [way("gromo", "gromo", 5000), way("gromo, accelerated", "growkern", 600, gromo=[8, 8, 8])]
    ways += [way("gromo's passes", "passes", 100)]
    rows = {"net": {"op": "growth_step", "ways": ways, **described}}
    ((_, line),) = report.steps(rows)
    assert line == ["net", "0.1", "2 (1–3)", "50 (40–60)", "10", "20", "500"]
    ((_, line),) = report.drop_in(rows)
    assert line == ["net", "5", "0.6", "8 (8–8)", "9.8", "500 / 60"]
    ways = [way("Grower.step", "growkern", 8000, training=[0.1, 0.08, 0.125]), way("training", "training", 800)]
    rows = {"net": {"op": "growth_beside_an_epoch", "epoch": 200, "ways": ways, **described}}
    ((_, line),) = report.epochs(rows)
    assert line == ["net", "8", "160", "5% (4–6.25%)"]
