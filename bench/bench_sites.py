"""Many sites at once, and the whole statistics pass of a network beside the forward and backward pass it rides on."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import baselines
import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCES, error
from models import resnet18
from race import TOLERANCES as LOOSE
from race import Race, Way, at_precision
from torch import Tensor, nn

import growkern as gk
from growkern.backend import use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, Residual, grouped_moments, grouped_residuals

THROUGH_A_NETWORK = 1e-3  # float32 activations and gradients of 18 layers
SAME = ConvGeometry(3, 1, 1)
TWENTY_WIDTHS = [(16, 32, 64, 128, 256)[number % 5] for number in range(20)]
TWENTY_MAPS = [((8, 32), (16, 16), (32, 8))[number * 3 // 20] for number in range(20)]  # channels, side
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 16


def linear_calls(widths: list[int], rows: int, device: str, dtype: torch.dtype = torch.float32) -> list[Call]:
    drawn = (torch.randn(3, rows, width, device=device).to(dtype).unbind() for width in widths)
    return [Call(*tensors, x_bias=True, h_bias=True) for tensors in drawn]


def map_calls(
    shapes: list[tuple[int, int]], images: int, device: str, dtype: torch.dtype = torch.float32
) -> list[Call]:
    sizes = ((3, images, channels, side, side) for channels, side in shapes)
    drawn = (torch.randn(size, device=device).to(dtype).unbind() for size in sizes)
    return [Call(*tensors, SAME, SAME) for tensors in drawn]


def with_draws(calls: list[Call]) -> list[Residual]:
    """The same calls with a change of the consumer, and a sign for every image or 16 rows under each draw."""
    found = []
    for call in calls:
        run = 1 if call.consumer else 16
        features = call.h.shape[1] * (call.consumer.taps if call.consumer else 1) + call.h_bias
        update = torch.randn(call.v.shape[1], features, device=call.v.device).double() / features**0.5
        signs = torch.randn(DRAWS, -(-len(call.x) // run), device=call.v.device).sign()
        found.append(Residual(call, update, signs, run))
    return found


def loops(calls: list[Call]) -> Iterator[tuple[str, str, Callable[[Call], Any]]]:
    """PyTorch's ways to the moments of one site."""
    ways: dict[tuple[str, str], Any] = {("unfold", "users"): baselines.by_unfold}
    ways |= {(f"shifts by {e}", "pytorch"): partial(baselines.by_shifts, engine=e) for e in ("gradient", "products")}
    if calls[0].producer is None:
        ways = {("six products", "users"): baselines.six_products, ("one product", "pytorch"): baselines.one_product}
    for (name, kind), way in ways.items():
        yield name, kind, lambda call, way=way: of_call(way, call)


def loops_of_residuals(calls: list[Residual]) -> Iterator[tuple[str, str, Callable[[Residual], Any]]]:
    """PyTorch's ways to N of one site and its draws."""
    by_image = partial(baselines.residual_by_unfold, per_image=True)
    ways: dict[tuple[str, str], Any] = {("draw by draw", "users"): baselines.residual_by_unfold}
    ways["by image", "pytorch"] = by_image
    if calls[0].call.producer is None:
        ways = {("draw by draw", "users"): baselines.draw_by_draw, ("all draws", "pytorch"): baselines.all_draws}
    for (name, kind), way in ways.items():

        def run(each: Residual, way: Any = way) -> Any:
            runs = {} if each.call.consumer else {"rows_per_sign": each.rows_per_sign}
            return of_call(way, each.call, each.update, signs=each.signs, **runs)

        yield name, kind, run


def of_call(way: Callable[..., Any], call: Call, *args: Tensor, **named: Any) -> Any:
    options = call._asdict()
    keys = ("producer", "consumer", "kernel", "x_bias", "h_bias") if call.consumer else ("x_bias", "h_bias")
    way = partial(baselines.from_half, way) if call.x.dtype == torch.float16 else way
    return way(*call[:3], *args, **named, **{key: options[key] for key in keys})


def measure_group(name: str, calls: list[Any], race: Race, device: str) -> None:
    """Moments of many sites, or residuals, in one call, one by one and by PyTorch."""
    residuals = isinstance(calls[0], Residual)
    op = grouped_residuals if residuals else grouped_moments
    dtype = (calls[0].call if residuals else calls[0]).x.dtype

    def double(call: Any) -> Any:
        if residuals:
            return call._replace(call=double_of(call.call))
        return double_of(call)

    def double_of(call: Call) -> Call:
        return call._replace(x=call.x.double(), h=call.h.double(), v=call.v.double())

    with use_backend("reference"):
        expected = [each for found in op([double(call) for call in calls]) for each in found]

    def wrong(out: list[tuple[Tensor, ...]]) -> float:
        return max(error(one, ref) for one, ref in zip([t for found in out for t in found], expected, strict=True))

    tolerance = TOLERANCES[dtype]
    ways = [
        Way("together", "growkern", lambda: op(calls), tolerance),
        Way("one by one", "growkern", lambda: [op([call])[0] for call in calls], tolerance),
        *(
            Way(n, kind, lambda f=f: [f(call) for call in calls], LOOSE[dtype])
            for n, kind, f in (loops_of_residuals if residuals else loops)(calls)
        ),
    ]
    with at_precision(device, "tf32" if dtype == torch.float16 else "ieee"):
        race(described(op.__name__, name, device, dtype), ways, wrong)


def described(op: str, name: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    dtype_name = str(dtype).removeprefix("torch.")
    return {"op": op, "case": name, "dtype": dtype_name, "precision": "ieee", "device": device}


def rows(size: str, device: str) -> Iterator[Any]:
    """Moments in single precision first, then residuals; half precision comes last."""
    for draws in (False, True):
        for dtype in DTYPES:
            rank = 4 if dtype != torch.float32 else 2 if draws else 0
            text = f"{'residuals' if draws else 'moments'}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(draws, dtype, id=text, marks=pytest.mark.later(rank))


@pytest.mark.rows.with_args(rows)
def test_linear_sites(draws: bool, dtype: torch.dtype, race: Race, device: str, request: pytest.FixtureRequest) -> None:
    number = 4096 if request.config.option.size == "bench" else 64
    calls = linear_calls(TWENTY_WIDTHS, number, device, dtype)
    name = f"20 linear sites of 16 to 256, {number} rows"
    measure_group(name, with_draws(calls) if draws else calls, race, device)


@pytest.mark.rows.with_args(rows)
def test_convolution_sites(
    draws: bool, dtype: torch.dtype, race: Race, device: str, request: pytest.FixtureRequest
) -> None:
    images = 32 if request.config.option.size == "bench" else 2
    calls = map_calls(TWENTY_MAPS, images, device, dtype)
    name = f"20 convolutions of 8 to 32, {images} images"
    measure_group(name, with_draws(calls) if draws else calls, race, device)


@pytest.mark.parametrize(("channels", "side"), [(16, 32), (64, 32), (256, 8)])
def test_draws(channels: int, side: int, race: Race, device: str, request: pytest.FixtureRequest) -> None:
    """What `neurons="auto"` adds to the measurement of a convolution: random signs in the second pass."""
    number, images = 8, 64
    if request.config.option.size != "bench":
        channels, side, number, images = 4, 8, 2, 3
    model = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))).to(device)
    model.insert(1, nn.ReLU())
    maps = torch.randn(number, images, channels, side, side, device=device)
    batches = list(zip(maps, maps.roll(1, 0), strict=True))

    def collect(network: nn.Module, pairs: Any, draws: int) -> Any:
        site = gk.GrowthSite("0", "2", ("1",))
        return gk.collect(network, site, pairs, lambda z, t: (z * t).sum() / len(z), null_draws=draws)["0"]

    with use_backend("reference"):
        expected = collect(copy.deepcopy(model).double(), [(x.double(), y.double()) for x, y in batches], 16)

    def wrong(out: gk.Moments) -> float:
        names = ("xx", "xv", "hh", "hv", "vv", "xr", *(("null",) if out.null is not None else ()))
        return max(error(getattr(out, name), getattr(expected, name)) for name in names)

    ways = [
        Way("collect", "growkern", lambda: collect(model, batches, 16), THROUGH_A_NETWORK),
        Way("without draws", "growkern", lambda: collect(model, batches, 0), THROUGH_A_NETWORK),
    ]
    race(
        described("collect", f"with draws, {channels}ch {side}² {number} × {images}", device, torch.float32),
        ways,
        wrong,
    )


def test_statistics_pass(race: Race, device: str, request: pytest.FixtureRequest) -> None:
    """Moments of all sites of a ResNet-18; "forward and backward" is the pass alone, whose cost is in both."""
    images = 2 if request.config.option.size != "bench" else 256 if device == "cuda" else 32
    model = resnet18(1 / 4).to(device).eval()
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
    race(described("collect", name, device, torch.float32), ways, wrong)
