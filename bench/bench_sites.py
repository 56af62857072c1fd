"""Many sites at once, and the whole statistics pass of a network beside the forward and backward pass it rides on."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import baselines
import pytest
import torch
import torch.nn.functional as F
from cases import error
from race import TOLERANCES, Race, Way
from torch import Tensor, nn

import growkern as gk
from growkern.backend import use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, grouped_moments
from growkern.training.models import Block

TOLERANCE = 2e-6
THROUGH_A_NETWORK = 1e-3  # float32 activations and gradients of 18 layers
SAME = ConvGeometry(3, 1, 1)
TWENTY_WIDTHS = [(16, 32, 64, 128, 256)[number % 5] for number in range(20)]
TWENTY_MAPS = [((8, 32), (16, 16), (32, 8))[number * 3 // 20] for number in range(20)]  # channels, side


def linear_calls(widths: list[int], rows: int, device: str) -> list[Call]:
    drawn = (torch.randn(3, rows, width, device=device).unbind() for width in widths)
    return [Call(*tensors, x_bias=True, h_bias=True) for tensors in drawn]


def map_calls(shapes: list[tuple[int, int]], images: int, device: str) -> list[Call]:
    drawn = (torch.randn(3, images, channels, side, side, device=device).unbind() for channels, side in shapes)
    return [Call(*tensors, SAME, SAME) for tensors in drawn]


def loops(calls: list[Call]) -> Iterator[tuple[str, str, Callable[[Call], Any]]]:
    if calls[0].producer is None:
        for name, kind, way in (
            ("six products", "users", baselines.six_products),
            ("one product", "pytorch", baselines.one_product),
        ):
            yield name, kind, lambda c, way=way: way(*c[:3], x_bias=c.x_bias, h_bias=c.h_bias)
        return
    ways: dict[tuple[str, str], Any] = {("unfold", "users"): baselines.by_unfold}
    ways |= {(f"shifts by {e}", "pytorch"): partial(baselines.by_shifts, engine=e) for e in ("gradient", "products")}
    for (name, kind), way in ways.items():
        yield name, kind, lambda c, way=way: way(*c[:3], **{k: v for k, v in c._asdict().items() if k in NAMED})


NAMED = ("producer", "consumer", "kernel", "x_bias", "h_bias")


def measure_group(name: str, calls: list[Call], race: Race, device: str) -> None:
    double = [call._replace(x=call.x.double(), h=call.h.double(), v=call.v.double()) for call in calls]
    with use_backend("reference"):
        expected = [each for six in grouped_moments(double) for each in six]

    def wrong(out: list[tuple[Tensor, ...]]) -> float:
        return max(error(one, ref) for one, ref in zip([t for six in out for t in six], expected, strict=True))

    ways = [
        Way("together", "growkern", lambda: grouped_moments(calls), TOLERANCE),
        Way("one by one", "growkern", lambda: [grouped_moments([call])[0] for call in calls], TOLERANCE),
        *(
            Way(n, kind, lambda f=f: [f(call) for call in calls], TOLERANCES[torch.float32])
            for n, kind, f in loops(calls)
        ),
    ]
    race(described("grouped_moments", name, device), ways, wrong)


def described(op: str, name: str, device: str) -> dict[str, Any]:
    return {"op": op, "case": name, "dtype": "float32", "precision": "ieee", "device": device}


def test_linear_sites(race: Race, device: str, request: pytest.FixtureRequest) -> None:
    rows = 4096 if request.config.option.size == "bench" else 64
    name = f"20 linear sites of 16 to 256, {rows} rows"
    measure_group(name, linear_calls(TWENTY_WIDTHS, rows, device), race, device)


def test_convolution_sites(race: Race, device: str, request: pytest.FixtureRequest) -> None:
    images = 32 if request.config.option.size == "bench" else 2
    name = f"20 convolutions of 8 to 32, {images} images"
    measure_group(name, map_calls(TWENTY_MAPS, images, device), race, device)


def resnet18(inner: int) -> nn.Module:
    """ResNet-18 for 32×32 images; its blocks' inner channels are 1/inner of the residual stream's."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    before = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for number in range(2):
            layers.append(Block(before, channels, channels // inner, 2 if stage and not number else 1))
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def test_statistics_pass(race: Race, device: str, request: pytest.FixtureRequest) -> None:
    """Moments of all sites of a ResNet-18; "forward and backward" is the pass alone, whose cost is in both."""
    images = 2 if request.config.option.size != "bench" else 256 if device == "cuda" else 32
    model = resnet18(4).to(device).eval()
    x, y = torch.randn(images, 3, 32, 32, device=device), torch.randint(0, 10, (images,), device=device)
    sites = gk.find_sites(copy.deepcopy(model), x[:2])

    def collect(network: nn.Module, images: Tensor) -> Any:
        return gk.collect(network, sites, [(images, y)], F.cross_entropy, kernel="center", null_draws=0)

    def alone() -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    with use_backend("reference"):
        expected = collect(copy.deepcopy(model).double(), x.double())

    def wrong(out: Any) -> float:
        if out is None:
            return 0.0
        fields = ("xx", "xh", "xv", "hh", "hv", "vv")
        pairs = [(getattr(out[name], field), getattr(expected[name], field)) for name in out for field in fields]
        return max(error(one, ref.double()) for one, ref in pairs)

    ways = [
        Way("collect", "growkern", lambda: collect(model, x), THROUGH_A_NETWORK),
        Way("forward and backward", "pass", alone, 0.0),
    ]
    name = f"ResNet-18, inner width 1/4, {images} images, {len(sites)} sites"
    race(described("collect", name, device), ways, wrong)
