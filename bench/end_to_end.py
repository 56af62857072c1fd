"""Whole growth steps beside gromo's and those of PyTorch alone; what growing costs beside an epoch of training.

python -m pytest bench/end_to_end.py -q --benchmark-quiet [-k "ResNet and 1/4"], with the options of the suite.

A growth step measures all sites that gromo's container grows and gives each its best update and 8 neurons, forward and
backward passes included. What is found is held against moments in float64: the error is √(1 − the part of the best
decrease that its direction reaches), the largest of all updates and neurons.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import cholesky
import gromo_containers
import models
import pytest
import torch
import torch.nn.functional as F
from clock import Clock
from pytorch_step import PyTorchStep
from race import Race, Way
from torch import Tensor, nn

import growkern as gk
from growkern.gromo import accelerate

NEURONS = 8
TOLERANCE = 1e-3  # float32 activations and gradients of up to 18 layers
GROMO = 3e-2  # which factors in float32
PATIENCE = 5  # times the seconds of an op's row

Batches = list[tuple[Tensor, Tensor]]
Found = list[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A network by its name in `models` and `gromo_containers`, and the batches that it grows on."""

    name: str
    network: str
    sizes: tuple[float, ...]
    shape: tuple[int, ...]  # of a batch
    batches: int = 1
    kernel: str = "center"

    def __str__(self) -> str:
        return f"{self.name}, {self.batches} × {'×'.join(map(str, self.shape))}"


IMAGES = (64, 3, 32, 32)
# Samples are more than the widest x has features, so that one answer is right.
CASES = {
    "bench": (
        Case("MLP 784-256-256-256-256", "mlp", (784, 256, 256, 256, 256), (1024, 784), 2),
        Case("Transformer, 2 layers of 256, feed-forward 1024", "encoder", (2, 256, 4, 1024), (32, 64, 256), 2),
        Case("VGG-13, 3 stages, width 1/2", "vgg13", (3, 1 / 2), IMAGES, 2),
        Case("ResNet-18, 2 stages, inner width 1/4, whole kernels", "resnet18", (1 / 4, 2), (64, 3, 16, 16), 1, "full"),
        *(
            Case(f"ResNet-18, inner width {width}", "resnet18", (float(Fraction(width)),), IMAGES, 6)
            for width in ("1/4", "1/64", "1/16", "1")
        ),
    ),
    "test": (
        Case("MLP 12-8-8", "mlp", (12, 8, 8), (64, 12), 2),
        Case("Transformer, 1 layer of 16, feed-forward 32", "encoder", (1, 16, 2, 32), (8, 8, 16)),
        Case("VGG-13, 1 stage, width 1/16", "vgg13", (1, 1 / 16), (4, 3, 32, 32)),
        Case("ResNet-18, 1 stage, inner width 1/16, whole kernels", "resnet18", (1 / 16, 1), (16, 3, 8, 8), 1, "full"),
    ),
}
EPOCHS = {
    "bench": (
        Case("VGG-13, width 1/2", "vgg13", (5, 1 / 2), (125, 3, 32, 32), 8),
        Case("ResNet-18, inner width 1/4", "resnet18", (1 / 4,), (125, 3, 32, 32), 8),
        Case("ResNet-18, inner width 1", "resnet18", (1,), (125, 3, 32, 32), 8),
    ),
    "test": (Case("ResNet-18, 1 stage, inner width 1/16", "resnet18", (1 / 16, 1), (32, 3, 8, 8), 2),),
}
TRAINED = 2  # batches on which training is timed
EPOCH = 50  # times the images that a growth step sees


def rows(table: dict[str, tuple[Case, ...]]) -> Callable[[str, str], Iterator[Any]]:
    return lambda size, device: (pytest.param(case, id=str(case)) for case in table[size])


def start(case: Case, device: str) -> tuple[nn.Module, Batches]:
    """A new network in evaluation mode, and images of faint patterns beneath noise as its batches."""
    patterns = torch.randn(models.CLASSES, *case.shape[1:])
    targets = torch.randint(models.CLASSES, (case.batches, case.shape[0]))
    batches = [((0.5 * patterns[y] + torch.randn(case.shape)).to(device), y.to(device)) for y in targets]
    model = getattr(models, case.network)(*case.sizes).to(device)
    return models.settle(model, batches[0][0]), batches


def described(op: str, case: Case, device: str) -> dict[str, Any]:
    return {"op": op, "case": str(case), "dtype": "float32", "precision": "ieee", "device": device}


@pytest.mark.rows.with_args(rows(CASES))
def test_growth_step(case: Case, race: Race, clock: Clock, device: str) -> None:
    model, batches = start(case, device)
    pooled = {name for name, module in model.named_modules() if isinstance(module, nn.MaxPool2d)}
    sites = [site for site in gk.find_sites(model, batches[0][0][:2]) if pooled.isdisjoint(site.between)]
    # What PyTorch does in float64, one product for each shift, is what all are held against.
    double = PyTorchStep(copy.deepcopy(model).double(), sites, case.kernel)
    wanted = [Wanted(each) for each in double.measured([(x.double(), y) for x, y in batches])]
    by_hand = PyTorchStep(model, sites, case.kernel, clock)
    by_hand(batches[:1], 1)  # finds the fastest ways

    def growkern() -> Found:
        moments = gk.collect(model, sites, batches, F.cross_entropy, kernel=case.kernel, null_draws=0)
        return [(new.alpha, new.omega, new.best_update) for new in gk.solve(moments, neurons=NEURONS).values()]

    def error(found: Found | None) -> float:
        if found is None:
            return 0.0
        return max(site.missed(*each) for site, each in zip(wanted, found, strict=True))

    ways = [
        Way("growkern", "growkern", growkern, TOLERANCE),
        Way("PyTorch", "pytorch", lambda: by_hand(batches, NEURONS), TOLERANCE),
        *ways_of_gromo(case, model, batches, device),
    ]
    race.budget *= PATIENCE
    left_out = {} if len(ways) > 2 else {"gromo": "not installed"}
    race(described("growth_step", case, device), ways, error, left_out=left_out)


class Wanted:
    """The best decreases that updates and neurons of a site can reach, by moments in float64."""

    def __init__(self, moments: dict[str, Tensor]) -> None:
        self.moments = {name: moments[name] for name in ("xx", "xr", "hh", "hv")}
        alpha, omega = cholesky.best_neurons(cholesky.factor(moments["xx"]), moments["xr"], NEURONS)
        self.best = self.decreases(alpha, omega, moments["update"])

    def decreases(self, alpha: Tensor, omega: Tensor, update: Tensor) -> tuple[float, float]:
        """At the best amplitude: ⟨M, target⟩² / ⟨M, second moment · M⟩, of neurons and of the update."""
        m = self.moments
        along = ((alpha @ m["xr"]) * omega.mT).sum()
        energy = ((alpha @ m["xx"] @ alpha.mT) * (omega.mT @ omega)).sum()
        along_update = (update.mT * m["hv"]).sum()
        return float(along**2 / energy), float(along_update**2 / ((update @ m["hh"]) * update).sum())

    def missed(self, *found: Tensor) -> float:
        shares = zip(self.decreases(*(each.double() for each in found)), self.best, strict=True)
        return max(abs(1 - reached / best) for reached, best in shares) ** 0.5


def ways_of_gromo(case: Case, plain: nn.Module, batches: Batches, device: str) -> Iterator[Way]:
    """gromo's container with the same weights, as it is, with the drop-in, and its passes without any statistics."""
    try:
        options = {"full": True} if case.kernel == "full" else {}
        make = getattr(gromo_containers, case.network)
        model = gromo_containers.load(make(*case.sizes, device=device, **options), plain)
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
    model, batches = start(case, device)
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

    @torch.no_grad()
    def loss(network: nn.Module) -> float:
        return sum(float(F.cross_entropy(network(x), y)) for x, y in batches) / len(batches)

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
