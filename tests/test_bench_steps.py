"""Whole growth steps of the bench suite: by hand, in gromo and in growkern they find the same."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import gromo_containers
import gromo_examples
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


SCRIPT = """
import torch
from helpers.sizes import ROWS
from gromo.modules.linear_growing_module import LinearGrowingModule

first = LinearGrowingModule(6, 4, post_layer_function=torch.nn.Identity())
second = LinearGrowingModule(4, 3, previous_module=first)
net, x = torch.nn.Sequential(first, second), torch.randn(ROWS, 6)

def loss():
    return (net(x) - x[:, :3].sin()).square().sum()

print(f"Initial error: {loss():.6e}, of {ROWS} rows")
second.init_computation()
loss().backward()
second.update_computation()
second.compute_optimal_updates(maximum_added_neurons=1)
second.scaling_factor = 0.1
second.apply_change()
print("Test Loss:", float(loss()))
"""


def test_examples_of_gromo(tmp_path: Path) -> None:
    """A script that grows linearly, so that signs of neurons do not show, ends alike in both ways."""
    pytest.importorskip("gromo", reason="gromo is not installed: pip install gromo==0.1.0")
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "sizes.py").write_text("ROWS = 50")
    (tmp_path / "grow.py").write_text(SCRIPT)
    row = gromo_examples.measured(tmp_path / "grow.py", rounds=1)
    own, gromo = row["ways"]
    assert own["error"] < 1e-4
    assert 0 < gromo["loss"] == pytest.approx(own["loss"], rel=1e-4)
    for way in (own, gromo):
        assert 0 < way["statistics, ms"] < way["all, ms"]
        assert way["ms"] == pytest.approx(way["statistics, ms"] + way["updates, ms"], rel=1e-3)
    assert own["over"]["gromo"][0] == pytest.approx(gromo["ms"] / own["ms"], rel=1e-2)
    ((_, line),) = report.examples({"grow": row})
    assert line[0] == "`grow`"
    assert line[1].count(" + ") == line[2].count(" + ") == 1
    told = "Step 3, Test Loss: 4.58 (-0.01)\nNew error: 4.0e-02\nScaling factor: 0.5, Loss: 1.25\n  val_loss=7.5"
    assert [float(loss) for loss in gromo_examples.LOSS.findall(told)] == [4.58, 0.04, 1.25, 7.5]
