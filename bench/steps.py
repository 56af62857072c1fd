"""Growth steps: on which networks and batches, in growkern, and what is the best that one can find."""

from dataclasses import dataclass

import cholesky
import gromo_containers
import models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growkern as gk

NEURONS = 8

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
        *(Case(f"ResNet-18, inner width 1/{n}", "resnet18", (1 / n,), IMAGES, 6) for n in (4, 64, 16)),
    ),
    "large": (Case("ResNet-18, inner width 1", "resnet18", (1,), IMAGES, 6),),
    "test": (
        Case("MLP 12-16-16", "mlp", (12, 16, 16), (64, 12), 2),
        Case("Transformer, 1 layer of 16, feed-forward 32", "encoder", (1, 16, 2, 32), (8, 8, 16)),
        Case("VGG-13, 1 stage, width 1/16, whole kernels", "vgg13", (1, 1 / 16), (4, 3, 32, 32), 1, "full"),
        Case("ResNet-18, 1 stage, inner width 1/16", "resnet18", (1 / 16, 1), (16, 3, 8, 8)),
    ),
}
EPOCHS = {
    "bench": (
        Case("VGG-13, width 1/2", "vgg13", (5, 1 / 2), (125, 3, 32, 32), 8),
        Case("ResNet-18, inner width 1/4", "resnet18", (1 / 4,), (125, 3, 32, 32), 8),
    ),
    "large": (Case("ResNet-18, inner width 1", "resnet18", (1,), (125, 3, 32, 32), 8),),
    "test": (Case("ResNet-18, 1 stage, inner width 1/16", "resnet18", (1 / 16, 1), (32, 3, 8, 8), 2),),
}


def start(case: Case, device: str, strength: float = 0.5) -> tuple[nn.Module, Batches]:
    """A new network in evaluation mode, and images of ten patterns and noise as its batches."""
    patterns = torch.randn(models.CLASSES, *case.shape[1:])
    targets = torch.randint(models.CLASSES, (case.batches, case.shape[0]))
    batches = [((strength * patterns[y] + torch.randn(case.shape)).to(device), y.to(device)) for y in targets]
    model = getattr(models, case.network)(*case.sizes).to(device)
    return models.settle(model, batches[0][0]), batches


def sites_of(model: nn.Module, x: Tensor) -> list[gk.GrowthSite]:
    """Sites that grow in gromo, too: all but those across a pooling."""
    pooled = {name for name, module in model.named_modules() if isinstance(module, nn.MaxPool2d)}
    return [site for site in gk.find_sites(model, x[:2]) if pooled.isdisjoint(site.between)]


def growkern(model: nn.Module, sites: list[gk.GrowthSite], batches: Batches, kernel: str) -> Found:
    moments = gk.collect(model, sites, batches, F.cross_entropy, kernel=kernel, null_draws=0)
    return [(new.alpha, new.omega, new.best_update) for new in gk.solve(moments, neurons=NEURONS).values()]


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


def container(case: Case, plain: nn.Module, device: str) -> nn.Module:
    """gromo's container with the weights of a plain network."""
    options = {"full": True} if case.kernel == "full" else {}
    make = getattr(gromo_containers, case.network)
    return gromo_containers.load(make(*case.sizes, device=device, **options), plain)
