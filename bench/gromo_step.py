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
from dataclasses import dataclass
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


def resnet(kind: type, stages: int) -> nn.Module:
    """The first stages of ResNet-18 for small images, with a quarter of the inner width."""
    options = {"out_features": CLASSES, "reduction_factor": 0.25, "number_of_blocks_per_stage": 2, "nb_stages": stages}
    model = init_full_resnet_structure((3, 32, 32), growing_conv_type=kind, **options)
    model.set_growing_layers(scheduling_method="all")
    return model


def vgg() -> nn.Module:
    """The first three stages of VGG-13, with half of the width."""
    target = [64, 64, "M", 128, 128, "M", 256, 256, "M"]
    cfg = [each if each == "M" else each // 2 for each in target]
    options: dict[str, Any] = {"num_classes": CLASSES, "number_of_fc_layers": 1, "activation": nn.ReLU()}
    return VGG(cfg, target, input_spatial_shape=(32, 32), **options)


@dataclass
class Case:
    """A container, the shape and number of its batches, and what growkern is to measure beside it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batches: int
    kernel: str | None = None


CASES = {
    "MLP 784-256-256-256-256-10": Case(mlp, (1024, 784), 2),
    "VGG-13 to its third stage, 1/2 width, Restricted": Case(vgg, (64, 3, 32, 32), 2),
    "ResNet-18 to its third stage, 1/4 inner width, Restricted": Case(
        lambda: resnet(RestrictedConv2dGrowingModule, 3), (64, 3, 32, 32), 1, "center"
    ),
    "ResNet-18 to its second stage, 1/4 inner width, Full": Case(
        lambda: resnet(FullConv2dGrowingModule, 2), (4, 3, 32, 32), 2, "full"
    ),
    "ResNet-18, 1/4 inner width, Restricted": Case(
        lambda: resnet(RestrictedConv2dGrowingModule, 4), (64, 3, 32, 32), 6, "center"
    ),
}
Batches = list[tuple[Tensor, Tensor]]


def build(case: Case) -> tuple[Any, Batches]:
    """Model in evaluation mode, as growkern measures, whose norms know their statistics, and batches."""
    torch.manual_seed(0)
    model = case.make()
    batches = [(torch.randn(case.shape), torch.randint(CLASSES, case.shape[:1])) for _ in range(case.batches)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(batches[0][0])
    return model.eval(), batches


def train(model: nn.Module, batches: Batches) -> None:
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()


def gromo_step(model: Any, batches: Batches) -> float:
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
    # gromo's threshold on singular values is absolute; without it each layer gets as many neurons.
    model.compute_optimal_updates(maximum_added_neurons=NEURONS, statistical_threshold=1e-12)
    return took + time.perf_counter() - start


def layers(model: Any) -> list[Any]:
    """What grows, in the order in which it runs."""
    if hasattr(model, "stages"):
        return [block.second_layer for stage in model.stages for block in stage]
    return model._growing_layers


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def results(model: Any) -> tuple[dict[tuple[int, str], Tensor], list[float], list[Tensor]]:
    """Statistics, improvements and singular values that a step left in the model."""
    named = {(i, name): getattr(module, name)() for i, module in enumerate(layers(model)) for name in STATISTICS}
    improvements = [float(module.first_order_improvement) for module in layers(model)]
    return named, improvements, [module.eigenvalues_extension for module in layers(model)]


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


def growkern_step(plain: nn.Module, sites: list[Any], batches: Batches, kernel: str) -> dict[str, gk.NewNeurons]:
    moments = gk.collect(plain, sites, batches, F.cross_entropy, kernel=kernel, null_draws=0)
    return gk.solve(moments, neurons=NEURONS)


def inner_sites(plain: nn.Module, x: Tensor) -> list[Any]:
    return [site for site in gk.find_sites(plain, x) if site.producer.endswith("first")]


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


def measure_memory(case: Case, way: str) -> int:
    """In this process: the extra peak of one step, or of the passes alone."""
    model, batches = build(case)
    result: list[int] = []
    if way == "growkern":
        assert case.kernel is not None
        plain = plain_resnet(model)
        sites = inner_sites(plain, batches[0][0])
        train(plain, batches[:1])
        del model
        with peak(result):
            growkern_step(plain, sites, batches, case.kernel)
    else:
        train(model, batches[:1])
        with accelerate() if way == "accelerated" else nullcontext(), peak(result):
            (train if way == "passes" else gromo_step)(model, batches)
    return result[0]


def memory(name: str, way: str) -> float:
    """MiB in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, way]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)
    return int(ran.stdout.splitlines()[-1]) / 2**20


def growth_step(name: str, repeats: int) -> Record:
    """A growth step of gromo's container as it is and accelerated, and of the same network in growkern."""
    case = CASES[name]
    model, batches = build(case)
    found: dict[str, Any] = {}
    parts: dict[str, list[float]] = {"gromo": [], "accelerated": []}

    def gromo(way: str) -> float:
        start = time.perf_counter()
        with accelerate() if way == "accelerated" else nullcontext():
            parts[way].append(gromo_step(model, batches))
        took = time.perf_counter() - start
        found[way] = results(model)
        model.reset_computation()
        for layer in model._growing_layers:
            layer.delete_update()
        return took

    ways = {way: lambda way=way: gromo(way) for way in parts}
    if case.kernel is not None:
        plain = plain_resnet(model)
        sites = inner_sites(plain, batches[0][0])
        assert len(sites) == len(model._growing_layers)

        def growkern() -> float:
            start = time.perf_counter()
            found["growkern"] = growkern_step(plain, sites, batches, case.kernel)
            return time.perf_counter() - start

        ways["growkern"] = growkern
        with torch.no_grad():
            assert torch.allclose(model(batches[0][0]), plain(batches[0][0]), rtol=1e-4, atol=1e-4)
    whole = in_turns(ways, repeats)
    part = {way: statistics.median(values) for way, values in parts.items()}
    extra = {way: memory(name, way) for way in ("passes", *ways)}
    record = {
        "case": name,
        "what": "growth step of all layers, 8 neurons each",
        "batches": f"{case.batches} of {'×'.join(map(str, case.shape))}",
        "whole step ms": {way: round(took * 1e3, 1) for way, took in whole.items()},
        "statistics and updates ms": {way: round(took * 1e3, 1) for way, took in part.items()},
        "statistics and updates, gromo over accelerated": round(part["gromo"] / part["accelerated"], 2),
        "whole step, gromo over accelerated": round(whole["gromo"] / whole["accelerated"], 2),
        "extra peak MiB": {way: round(mib) for way, mib in extra.items()},
    }
    record |= checked(found, batches[0][0].shape[0], sites if case.kernel == "center" else [])
    if case.kernel is not None:
        record["kernel"] = case.kernel
        record["whole step, gromo over growkern"] = round(whole["gromo"] / whole["growkern"], 2)
        record["extra peak, gromo over growkern"] = round(extra["gromo"] / extra["growkern"], 2)
    return record


def checked(found: dict[str, Any], batch: int, sites: list[Any]) -> Record:
    """Hold what was found against each other; "center" measures what gromo's Restricted does."""
    (named, improvements, values), (other_named, other_improvements, _) = found["gromo"], found["accelerated"]
    worst = max(error(other_named[key], tensor) for key, tensor in named.items())
    assert worst < 1e-5, worst
    apart = [abs(one - two) / one for one, two in zip(improvements, other_improvements, strict=True)]
    assert max(apart) < 0.01, apart
    record: Record = {"largest relative difference": {"statistics": worst, "improvements": max(apart)}}
    if sites:
        own = [found["growkern"][site.name].singular_values[:NEURONS] / batch for site in sites]
        # growkern's loss is a sum of per-sample losses, gromo's their mean.
        differences = [error(mine, theirs) for mine, theirs in zip(own, values, strict=True)]
        assert max(differences) < 0.01, differences
        record["largest relative difference"]["singular values, growkern"] = max(differences)
    return record


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

    ways = {"conv2d_moments": op, "drop-in": drop_in, "gromo": gromo}
    op()  # loads and lays out what is there to stay
    took = in_turns({name: lambda run=run: timed(run) for name, run in ways.items()}, repeats)
    xx, xh, xv, hh, hv, vv = op()
    pairs = dict(zip(STATISTICS, (hh, hv, vv, xv, None if full else xh, xx), strict=True))
    worst = max(error(mine, getattr(second, n)._tensor) for n, mine in pairs.items() if mine is not None)
    expected = {name: getattr(second, name)._tensor for name in STATISTICS}
    drop_in()
    worst = max(worst, *(error(getattr(second, name)._tensor, each) for name, each in expected.items()))
    assert worst < 1e-5, worst
    return {
        "case": f"{'Full' if full else 'Restricted'}, {channels} channels, {side}², batch {batch}",
        "what": "statistics of one batch: ops.conv2d_moments and the drop-in beside gromo",
        "gromo ms": round(took["gromo"] * 1e3, 1),
        "conv2d_moments ms": round(took["conv2d_moments"] * 1e3, 1),
        "drop-in ms": round(took["drop-in"] * 1e3, 1),
        "ratio": round(took["gromo"] / took["conv2d_moments"], 2),
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
        print(measure_memory(CASES[chosen.memory[0]], chosen.memory[1]))
        return
    n = chosen.repeats
    jobs: dict[str, Callable[[], Record]] = {name: lambda name=name: growth_step(name, n) for name in CASES}
    for kind, sizes in (
        (RestrictedConv2dGrowingModule, ((64, 32, 128), (128, 16, 128), (256, 8, 128))),
        (FullConv2dGrowingModule, ((64, 32, 16), (128, 16, 64), (256, 8, 128))),
    ):
        for channels, side, batch in sizes:
            jobs[f"op {kind.__name__} {channels}"] = lambda k=kind, c=channels, s=side, b=batch: statistics_beside_op(
                k, c, s, b, n
            )
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    hardware: Record = {
        "processor": processor[1] if processor else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gromo": "0.1.0",
    }
    longest = list(CASES)[-1]
    jobs[longest] = jobs.pop(longest)
    for name, job in jobs.items():
        if chosen.only not in name:
            continue
        record = {**job(), "runs": n, "load": round(os.getloadavg()[0], 1)}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        store(hardware, record)


def store(hardware: Record, record: Record) -> None:
    """Add a record to the file of this machine, in the place of an older one of the same case."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W+", "-", hardware["processor"]).strip("-").lower()
    path = RESULTS / f"{stem}-{hardware['threads']}-threads.json"
    records = json.loads(path.read_text())["results"] if path.exists() else []
    records = [each for each in records if each["case"] != record["case"]] + [record]
    whole = {"hardware": hardware, "command": "python bench/gromo_step.py", "results": records}
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
