"""gromo's growth steps as they are, with `growkern.gromo.accelerate()`, and in growkern: time and memory.

python bench/gromo_step.py [--only TEXT] [--repeats N] [--threads N] writes bench/results/gromo/<processor>.json.

On one thread times are those of the processor, to which other work on the machine matters little. They are medians of
runs taken in turns, after a check that both ways find the same. Memory is the peak resident size of a process of its
own above what it held before the step; forward and backward passes are part of it.
"""

import argparse
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
from gromo.modules.conv2d_growing_module import FullConv2dGrowingModule, RestrictedConv2dGrowingModule
from gromo_containers import (
    CASES,
    NEURONS,
    STATISTICS,
    Case,
    build,
    error,
    gromo_step,
    growkern_step,
    inner_sites,
    plain_resnet,
    results,
    train,
)
from torch import Tensor, nn

from growkern import ops
from growkern.gromo import accelerate
from growkern.ops import ConvGeometry

RESULTS = Path(__file__).parent / "results" / "gromo"
SAME = ConvGeometry(3, 1, 1)

Record = dict[str, Any]


def clock() -> float:
    """Seconds of the processor on one thread, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            taken[name].append(run())
    return {name: statistics.median(values) for name, values in taken.items()}


def timed(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


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
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--memory", name, way]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)
    return int(ran.stdout.splitlines()[-1]) / 2**20


def growth_step(name: str, repeats: int) -> Record:
    """A growth step of gromo's container as it is and accelerated, and of the same network in growkern."""
    case = CASES[name]
    model, batches = build(case)
    found: dict[str, Any] = {}
    parts: dict[str, list[float]] = {"gromo": [], "accelerated": []}

    def gromo(way: str) -> float:
        start = clock()
        with accelerate() if way == "accelerated" else nullcontext():
            parts[way].append(gromo_step(model, batches, clock))
        took = clock() - start
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
            start = clock()
            found["growkern"] = growkern_step(plain, sites, batches, case.kernel)
            return clock() - start

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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(chosen.threads)
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
