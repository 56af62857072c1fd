"""Many sites at once, and the whole statistics pass of a network beside the forward and backward pass it rides on.

python bench/sites.py [--device cuda|cpu] [--out FILE] [--repeats N]: medians of times taken in turns, after a
check against float64. Without --out the figures are printed only. With --host: what a call of a group costs the host
where everything about its shapes is known, with kernels that do nothing, as needs no GPU.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growkern as gk
from growkern import backend
from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, Residual, grouped_moments, grouped_residuals, triton
from growkern.ops.moments import group as group_module
from growkern.training.models import Block

TOLERANCE = 2e-6
SAME = ConvGeometry(3, 1, 1)


def seconds(candidates: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median wall time of each until the device is idle again, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 2):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn > 1:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def linear_sites(device: str) -> list[Call]:
    """20 sites of 16 to 256 features, 4096 rows each."""
    widths = [(16, 32, 64, 128, 256)[number % 5] for number in range(20)]
    return [Call(*torch.randn(3, 4096, width, device=device).unbind(), x_bias=True, h_bias=True) for width in widths]


def convolution_sites(device: str) -> list[Call]:
    """The sites of a tiny ResNet of 20 blocks, 8 to 32 channels, 32 images."""
    shapes = [((8, 32), (16, 16), (32, 8))[number * 3 // 20] for number in range(20)]
    return [
        Call(*torch.randn(3, 32, channels, side, side, device=device).unbind(), SAME, SAME) for channels, side in shapes
    ]


class NoKernels:
    """An engine of which every kernel does nothing, and which cuts as Triton's does."""

    tiles, subtract_tile = staticmethod(triton.tiles), staticmethod(triton.subtract_tile)

    def __getattr__(self, kernel: str) -> Callable[..., None]:
        return lambda *arguments: None


def host(name: str, calls: list[Call], repeats: int) -> dict:
    """Milliseconds of the host for the first and the second pass over a group of sites: the least and the median."""
    residuals = []
    for call in calls:
        features = call.h.shape[1] * (call.consumer.taps if call.consumer else 1) + call.h_bias
        update = torch.zeros(call.v.shape[1], features, dtype=torch.float64)
        residuals.append(Residual(call, update, torch.ones(16, len(call.x))))
    row: dict = {"case": name}
    for op, given in ((grouped_moments, calls), (grouped_residuals, residuals)):
        taken = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            op(given)
            taken.append(time.perf_counter() - start)
        figures = {"least": min(taken[2:]), "median": statistics.median(taken[2:]), "first": taken[0]}
        row[op.__name__] = {key: f"{value * 1e3:.3f} ms" for key, value in figures.items()}
    return row


def time_host(repeats: int) -> None:
    group_module.serve(NoKernels(), "triton")
    with mock.patch.dict(backend.DEVICES, {"triton": ("cpu",)}), backend.use_backend("triton"):
        print(host("20 linear sites", linear_sites("cpu"), repeats))
        print(host("20 convolutions", convolution_sites("cpu"), repeats))


def six_products(call: Call) -> list[Tensor]:
    x, h, v = call[:3]
    return [torch.mm(a.T, b) for a, b in ((x, x), (x, h), (x, v), (h, h), (h, v), (v, v))]


def group(name: str, calls: list[Call], usual: Callable[[Call], object] | None, args: argparse.Namespace) -> dict:
    double = [call._replace(x=call.x.double(), h=call.h.double(), v=call.v.double()) for call in calls]
    for sums, expected in zip(grouped_moments(calls), grouped_moments(double), strict=True):
        for one, other in zip(sums, expected, strict=True):
            assert (one - other).norm() <= TOLERANCE * other.norm(), name
    candidates: dict[str, Callable[[], object]] = {
        "together": lambda: grouped_moments(calls),
        "one by one": lambda: [grouped_moments([call]) for call in calls],
    }
    if usual is not None:
        candidates["torch"] = lambda: [usual(call) for call in calls]
    took = seconds(candidates, args.repeats, args.device)
    ratios = {f"over {other}": round(took[other] / took["together"], 2) for other in candidates if other != "together"}
    return {"case": name, "ms": round(took["together"] * 1e3, 3), **ratios}


def resnet18(inner: int) -> nn.Module:
    """ResNet-18 for 32×32 images; its blocks' inner channels are 1/inner of the residual stream's."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    before = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for number in range(2):
            layers.append(Block(before, channels, channels // inner, 2 if stage and not number else 1))
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def whole_pass(args: argparse.Namespace) -> dict:
    model = resnet18(4).to(args.device)
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    y = torch.randint(0, 10, (args.batch,), device=args.device)
    sites = gk.find_sites(copy.deepcopy(model), x[:2])

    def ride() -> None:
        model.eval()
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    def measure(draws: int) -> Callable[[], object]:
        return lambda: gk.collect(model, sites, [(x, y)], F.cross_entropy, kernel="center", null_draws=draws)

    took = seconds({"ride": ride, "moments": measure(0)}, args.repeats, args.device)
    return {
        "case": f"ResNet-18, inner width 1/4, batch {args.batch}, {len(sites)} sites, kernel='center', first pass",
        "ms": round(took["moments"] * 1e3, 2),
        "forward and backward ms": round(took["ride"] * 1e3, 2),
        "added": round(took["moments"] / took["ride"] - 1, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--host", action="store_true")
    args = parser.parse_args()
    if args.host:
        return time_host(args.repeats)
    torch.manual_seed(0)
    rows = []
    for name, job in (
        ("20 linear sites", lambda n: group(n, linear_sites(args.device), six_products, args)),
        ("20 convolutions", lambda n: group(n, convolution_sites(args.device), None, args)),
        ("ResNet-18", lambda n: whole_pass(args)),
    ):
        rows.append(job(name))
        print(rows[-1], flush=True)
    if args.out:
        device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        args.out.write_text(
            json.dumps({"device": device, "torch": torch.__version__, "results": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
