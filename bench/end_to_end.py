"""Whole growth steps beside gromo's and those of PyTorch alone; what growing costs beside an epoch of training.

python -m pytest bench/end_to_end.py -q --benchmark-quiet [-k "ResNet and 1/4"], with the options of the suite;
`--size large` is for ResNet-18 as it is, with the inner width of its residual stream.

A growth step measures all sites that gromo's container grows and gives each its best update and 8 neurons, forward and
backward passes included. What is found is held against moments in float64 of the same maps: the error is √(1 − the part
of the best decrease that its direction reaches), the largest of all updates and neurons.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import gromo_containers
import pytest
import torch
import torch.nn.functional as F
from clock import Clock
from pytorch_step import PyTorchStep
from race import Race, Way, at_precision
from steps import CASES, EPOCHS, NEURONS, Batches, Case, Found, Wanted, container, growkern, sites_of, start
from torch import nn

import growkern as gk
from growkern.gromo import accelerate

TOLERANCE = 1e-3  # a sign that a ReLU rounds the other way changes gradients by that much
GROMO = 3e-2  # which factors in float32
PATIENCE = 2  # times the seconds of an op's row


TRAINED = 2  # batches on which training is timed
EPOCH = 50  # times the images that a growth step sees


def rows(table: dict[str, tuple[Case, ...]]) -> Callable[[str, str], Iterator[Any]]:
    """Those of a size; on a GPU the large ones, too."""

    def chosen(size: str, device: str) -> Iterator[Any]:
        sizes = (size, "large") if (size, device) == ("bench", "cuda") else (size,)
        return (pytest.param(case, id=str(case)) for each in sizes for case in table[each])

    return chosen


def described(op: str, case: Case, device: str) -> dict[str, Any]:
    return {"op": op, "case": str(case), "dtype": "float32", "precision": "ieee", "device": device}


@pytest.fixture(autouse=True)
def _precision(device: str) -> Iterator[None]:
    with at_precision(device, "ieee"):
        yield


@pytest.mark.rows.with_args(rows(CASES))
def test_growth_step(case: Case, race: Race, clock: Clock, device: str) -> None:
    model, batches = start(case, device)
    sites = sites_of(model, batches[0][0])
    wanted = [Wanted(each) for each in PyTorchStep(model, sites, case.kernel).measured(batches)]
    by_hand = PyTorchStep(model, sites, case.kernel, clock)
    by_hand.try_ways(batches[:1])

    def error(found: Found | None) -> float:
        if found is None:
            return 0.0
        return max(site.missed(*each) for site, each in zip(wanted, found, strict=True))

    ways = [
        Way("growkern", "growkern", lambda: growkern(model, sites, batches, case.kernel), TOLERANCE),
        Way("PyTorch", "pytorch", lambda: by_hand(batches, NEURONS), TOLERANCE),
        *ways_of_gromo(case, model, batches, device),
    ]
    race.budget *= PATIENCE
    left_out = {} if len(ways) > 2 else {"gromo": "not installed"}
    race(described("growth_step", case, device), ways, error, left_out=left_out)


def ways_of_gromo(case: Case, plain: nn.Module, batches: Batches, device: str) -> Iterator[Way]:
    """gromo as it is, with the drop-in, and its passes without any statistics."""
    try:
        model = container(case, plain, device)
    except ImportError:
        return

    def step() -> Found:
        return gromo_containers.step(model, batches, NEURONS)

    def accelerated() -> Found:
        with accelerate():
            return step()

    yield Way("gromo", "gromo", step, GROMO)
    yield Way("gromo, accelerated", "growkern", accelerated, GROMO)
    yield Way("gromo's passes", "passes", lambda: gromo_containers.passes(model, batches), 0.0)


@pytest.mark.rows.with_args(rows(EPOCHS))
def test_growth_beside_an_epoch(case: Case, race: Race, device: str) -> None:
    """A step of `Grower` as it comes, on 2% of the images that an epoch trains on; training is timed on a few."""
    model, batches = start(case, device, strength=2.0)  # so that neurons stand above chance
    trained = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(trained.parameters(), 0.01, momentum=0.9)

    def train() -> None:
        for x, y in batches[:TRAINED]:
            optimizer.zero_grad()
            F.cross_entropy(trained(x), y).backward()
            optimizer.step()

    def step() -> tuple[gk.GrowthEvent, nn.Module]:
        grown = copy.deepcopy(model)
        optimizer = torch.optim.SGD(grown.parameters(), 0.01, momentum=0.9)
        return gk.Grower(grown, optimizer, F.cross_entropy).step(batches), grown

    held_out = batches[-max(len(batches) // 4, 1) :]  # on which the amplitude is chosen

    @torch.no_grad()
    def loss(network: nn.Module) -> float:
        return sum(float(F.cross_entropy(network(x), y)) for x, y in held_out) / len(held_out)

    def error(found: tuple[gk.GrowthEvent, nn.Module] | None) -> float:
        """How far the losses that the event tells are from those of the two networks, where growth went through."""
        if found is None:
            return 0.0
        event, grown = found
        ends = (event.loss_before, loss(model)), (event.loss_after, loss(grown))
        return max(abs(1 - told / is_so) for told, is_so in ends) if event.accepted else float("inf")

    ways = [Way("Grower.step", "growkern", step, TOLERANCE), Way("training", "training", train, 0.0)]
    race.budget *= PATIENCE
    row = described("growth_beside_an_epoch", case, device) | {"epoch": EPOCH * case.batches // TRAINED}
    race(row, ways, error)
