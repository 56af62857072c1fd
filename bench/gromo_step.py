"""gromo's growth steps as they are, with `growkern.gromo.accelerate()`, and in growkern: time and memory.

python bench/gromo_step.py [--only TEXT] [--repeats N] writes bench/results/gromo/<processor>.json.

Times are medians of runs taken in turns, after a check that both ways find the same. Memory is the peak resident
size of a process of its own above what it held before the step; forward and backward passes are part of it.
"""

import argparse
import copy
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gromo.containers.growing_mlp import GrowingMLP
from gromo.containers.resnet import init_full_resnet_structure
from gromo.containers.vgg import VGG
from gromo.modules.conv2d_growing_module import FullConv2dGrowingModule, RestrictedConv2dGrowingModule
from torch import Tensor, nn

import growkern as gk
from growkern import ops
from growkern.gromo import accelerate
from growkern.ops import ConvGeometry

RESULTS = Path(__file__).parent / "results" / "gromo"
STATISTICS = (
    "tensor_s",
    "tensor_m",
    "covariance_loss_gradient",
    "tensor_m_prev",
    "cross_covariance",
    "tensor_s_growth",
)
NEURONS = 8
CLASSES = 10
SAME = ConvGeometry(3, 1, 1)

Record = dict[str, Any]


# gromo's containers -----------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return GrowingMLP(784, CLASSES, hidden_size=256, number_hidden_layers=4, activation=nn.ReLU())


def resnet(kind: type) -> nn.Module:
    """ResNet-18 for small images with a quarter of the inner width."""
    model = init_full_resnet_structure(
        (3, 32, 32), out_features=CLASSES, reduction_factor=0.25, growing_conv_type=kind, number_of_blocks_per_stage=2
    )
    model.set_growing_layers(scheduling_method="all")
    return model


def vgg() -> nn.Module:
    """VGG-13 with half of its width."""
    target = [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
    cfg = [each if each == "M" else each // 2 for each in target]
    options: dict[str, Any] = {"num_classes": CLASSES, "number_of_fc_layers": 2, "fc_layer_width": 256, "dropout": 0.0}
    return VGG(cfg, target, initial_fc_layer_width=128, input_spatial_shape=(32, 32), activation=nn.ReLU(), **options)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-256-256-256-256-10, batch 256": (mlp, (256, 784)),
    "ResNet-18 at 1/4 inner width, Restricted, batch 64 of 32²": (
        lambda: resnet(RestrictedConv2dGrowingModule),
        (64, 3, 32, 32),
    ),
    "ResNet-18 at 1/4 inner width, Full, batch 16 of 32²": (lambda: resnet(FullConv2dGrowingModule), (16, 3, 32, 32)),
    "VGG-13 at 1/2 width, Restricted, batch 64 of 32²": (vgg, (64, 3, 32, 32)),
}
WAYS: dict[str, Callable[[], Any]] = {"gromo": nullcontext, "accelerated": accelerate}


def build(case: str) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Model in evaluation mode, as growkern measures, and two batches."""
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make().eval()
    with torch.no_grad():  # channels of unlike scale and norms with something to undo, as after some training
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    return model, [(torch.randn(shape), torch.randint(CLASSES, shape[:1])) for _ in range(2)]


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()


def gromo_step(model: Any, batches: list[tuple[Tensor, Tensor]]) -> float:
    """One growth step; the seconds that statistics and updates took of it."""
    took = 0.0
    model.init_computation()
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        start = time.perf_counter()
        model.update_computation()
        took += time.perf_counter() - start
    model.zero_grad()
    start = time.perf_counter()
    model.compute_optimal_updates(maximum_added_neurons=NEURONS)
    return took + time.perf_counter() - start


def layers(model: Any) -> list[Any]:
    return [getattr(layer, "second_layer", layer) for layer in model._growing_layers]


def clear(model: Any) -> None:
    model.reset_computation()
    for layer in model._growing_layers:
        layer.delete_update()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check_step(model: Any, batches: list[tuple[Tensor, Tensor]], way: Callable[[], Any]) -> float:
    """Same statistics and improvements; the largest relative difference of a statistic."""
    found = []
    for each in (nullcontext, way):
        with each():
            gromo_step(model, batches)
        named = {(i, n): getattr(m, n)() for i, m in enumerate(layers(model)) for n in STATISTICS}
        found.append((named, [float(layer.first_order_improvement) for layer in layers(model)]))
        clear(model)
    (named, improvements), (others, other_improvements) = found
    worst = max(error(others[key], tensor) for key, tensor in named.items())
    assert worst < 1e-5, worst
    for one, other in zip(improvements, other_improvements, strict=True):
        assert abs(one - other) < 0.02 * abs(one), (improvements, other_improvements)
    return worst


# The same network in growkern --------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """A residual block of ordinary layers with the weights of a gromo block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.pre_activation = copy.deepcopy(block.pre_activation)
        self.first, self.second = plain_conv(block.first_layer.layer), plain_conv(block.second_layer.layer)
        norm = next(m for m in block.first_layer.post_layer_function if isinstance(m, nn.BatchNorm2d))
        self.norm = nn.BatchNorm2d(norm.num_features)
        self.norm.load_state_dict(norm.state_dict())
        self.downsample = copy.deepcopy(block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(torch.relu(self.norm(self.first(self.pre_activation(x)))))
        return out + self.downsample(x)


def plain_conv(conv: nn.Conv2d) -> nn.Conv2d:
    options = {"stride": conv.stride, "padding": conv.padding, "bias": conv.bias is not None}
    made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **options)
    made.load_state_dict(conv.state_dict())
    return made


def plain_resnet(model: Any) -> nn.Module:
    blocks = [PlainBlock(block) for stage in model.stages for block in stage]
    return nn.Sequential(copy.deepcopy(model.pre_net), *blocks, copy.deepcopy(model.post_net)).eval()


def growkern_step(plain: nn.Module, sites: list[Any], batches: list[Any], kernel: str) -> dict[str, gk.NewNeurons]:
    moments = gk.collect(plain, sites, batches, F.cross_entropy, kernel=kernel, null_draws=0)
    return gk.solve(moments, neurons=NEURONS)


def inner_sites(plain: nn.Module, x: Tensor) -> list[Any]:
    return [site for site in gk.find_sites(plain, x) if site.producer.endswith("first")]


def check_growkern(model: Any, plain: nn.Module, batches: list[Any], kernel: str) -> None:
    """Same function, and for "center", which measures what gromo does, the same singular values up to their unit."""
    x = batches[0][0]
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
    sites = inner_sites(plain, x)
    assert len(sites) == len(model._growing_layers)
    gromo_step(model, batches)
    if kernel == "center":
        found = growkern_step(plain, sites, batches, kernel)
        for site, layer in zip(sites, layers(model), strict=True):
            own, theirs = found[site.name].singular_values[:4] / len(x), layer.eigenvalues_extension[:4]
            assert error(own, theirs) < 0.02, (site.name, own, theirs)
    clear(model)


# Measuring --------------------------------------------------------------------------------------------------


def in_turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            taken[name].append(run())
    return {name: statistics.median(values) for name, values in taken.items()}


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def status(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


@contextmanager
def peak(result: list[int]) -> Iterator[None]:
    """Bytes above those held at the start."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    yield
    result.append(status("VmHWM") - before)


def measure_memory(case: str, way: str) -> int:
    """In this process: the extra peak of one step, or of two training steps."""
    model, batches = build(case)
    result: list[int] = []
    if way in ("full", "center"):
        plain = plain_resnet(model)
        sites = inner_sites(plain, batches[0][0])
        train(plain, batches)
        del model
        with peak(result):
            growkern_step(plain, sites, batches, way)
    else:
        train(model, batches)
        with WAYS.get(way, nullcontext)(), peak(result):
            (train if way == "training" else gromo_step)(model, batches)
    return result[0]


def memory(case: str, way: str) -> float:
    """MiB in a process of its own."""
    command = [sys.executable, __file__, "--memory", case, way]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)
    return int(ran.stdout.splitlines()[-1]) / 2**20


def container(case: str, repeats: int) -> Record:
    """Statistics and updates of gromo's container, with and without."""
    model, batches = build(case)
    worst = check_step(model, batches, accelerate)

    def run(way: str) -> float:
        with WAYS[way]():
            took = gromo_step(model, batches)
        clear(model)
        return took

    took = in_turns({way: lambda way=way: run(way) for way in WAYS}, repeats)
    extra = {way: memory(case, way) for way in ("training", *WAYS)}
    return {
        "case": case,
        "what": "statistics and updates of one growth step on two batches, accelerate() beside gromo",
        "gromo ms": round(took["gromo"] * 1e3, 1),
        "accelerated ms": round(took["accelerated"] * 1e3, 1),
        "ratio": round(took["gromo"] / took["accelerated"], 2),
        "largest relative difference of a statistic": worst,
        "extra peak MiB": {way: round(mib) for way, mib in extra.items()},
    }


def growkern_beside_gromo(case: str, kernel: str, repeats: int) -> Record:
    """A whole growth step, forward and backward passes included, in growkern and in gromo."""
    model, batches = build(case)
    plain = plain_resnet(model)
    check_growkern(model, plain, batches, kernel)
    sites = inner_sites(plain, batches[0][0])

    def gromo() -> None:
        gromo_step(model, batches)
        clear(model)

    runs = {"gromo": gromo, "growkern": lambda: growkern_step(plain, sites, batches, kernel)}
    took = in_turns({name: lambda run=run: timed(run) for name, run in runs.items()}, repeats)
    extra = {
        name: memory(case, way) for name, way in (("training", "training"), ("gromo", "gromo"), ("growkern", kernel))
    }
    return {
        "case": f"{case}, collect + solve with kernel={kernel!r}",
        "what": "whole growth step on two batches, passes included, growkern beside gromo",
        "gromo ms": round(took["gromo"] * 1e3, 1),
        "growkern ms": round(took["growkern"] * 1e3, 1),
        "ratio": round(took["gromo"] / took["growkern"], 2),
        "extra peak MiB": {name: round(mib) for name, mib in extra.items()},
        "memory ratio": round(extra["gromo"] / extra["growkern"], 2),
    }


def statistics_beside_op(kind: type, channels: int, side: int, batch: int, repeats: int) -> Record:
    """The six statistics of a pair of 3×3 convolutions by gromo, and conv2d_moments on the same maps."""
    torch.manual_seed(0)
    size = (side, side)
    first = kind(channels, channels, 3, padding=1, use_bias=True, post_layer_function=nn.ReLU(), input_size=size)
    options = {"previous_module": first, "allow_growing": True, "input_size": size}
    second = kind(channels, channels, 3, padding=1, use_bias=True, **options)
    second.init_computation()
    second(first(torch.randn(batch, channels, *size))).square().mean().backward()
    x, h, v = first.input, second.input, second.pre_activity.grad
    full = kind is FullConv2dGrowingModule

    def gromo() -> None:
        for name in STATISTICS:
            getattr(second, name).reset()
            getattr(second, name).updated = False
        second.update_computation()

    def op() -> list[Tensor]:
        kernel = "full" if full else "center"
        return list(ops.conv2d_moments(x, h, v, producer=SAME, consumer=SAME, kernel=kernel, x_bias=True, h_bias=True))

    def drop_in() -> None:
        with accelerate():
            gromo()

    gromo()
    xx, xh, xv, hh, hv, vv = op()
    pairs = dict(zip(STATISTICS, (hh, hv, vv, xv, None if full else xh, xx), strict=True))
    worst = max(error(mine, getattr(second, n)._tensor) for n, mine in pairs.items() if mine is not None)
    assert worst < 1e-5, worst
    took = in_turns(
        {"gromo": lambda: timed(gromo), "op": lambda: timed(op), "drop-in": lambda: timed(drop_in)}, repeats
    )
    return {
        "case": f"{'Full' if full else 'Restricted'}, {channels} channels, {side}², batch {batch}",
        "what": "statistics of one batch: ops.conv2d_moments and the drop-in beside gromo",
        "gromo ms": round(took["gromo"] * 1e3, 1),
        "conv2d_moments ms": round(took["op"] * 1e3, 1),
        "drop-in ms": round(took["drop-in"] * 1e3, 1),
        "ratio": round(took["gromo"] / took["op"], 2),
        "drop-in ratio": round(took["gromo"] / took["drop-in"], 2),
        "largest relative difference": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if chosen.memory:
        print(measure_memory(*chosen.memory))
        return
    n = chosen.repeats
    restricted, full = (each for each in CASES if "ResNet" in each)
    jobs: dict[str, Callable[[], Record]] = {f"step {case}": lambda c=case: container(c, n) for case in CASES}
    jobs[f"growkern center {restricted}"] = lambda: growkern_beside_gromo(restricted, "center", n)
    jobs[f"growkern full {full}"] = lambda: growkern_beside_gromo(full, "full", n)
    for kind, sizes in (
        (RestrictedConv2dGrowingModule, ((64, 32, 128), (128, 16, 128), (256, 8, 128))),
        (FullConv2dGrowingModule, ((64, 32, 16), (128, 16, 64), (256, 8, 128))),
    ):
        for channels, side, batch in sizes:
            jobs[f"op {kind.__name__} {channels}"] = lambda k=kind, c=channels, s=side, b=batch: statistics_beside_op(
                k, c, s, b, n
            )
    results = []
    for name, job in jobs.items():
        if chosen.only in name:
            results.append(job())
            print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    hardware = {
        "processor": processor[1] if processor else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gromo": "0.1.0",
        "load at the end": round(os.getloadavg()[0], 1),
    }
    if not chosen.only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"\W+", "-", hardware["processor"]).strip("-").lower()
        path = RESULTS / f"{stem}-{hardware['threads']}-threads.json"
        record = {"hardware": hardware, "command": "python bench/gromo_step.py", "results": results}
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
