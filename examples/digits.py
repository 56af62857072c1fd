"""Grow two networks on scikit-learn's handwritten digits, next to two that never grow.

An MLP and a small convolutional network start two units wide and grow while they train. Beside each of them
trains the same tiny network, never grown, and a fixed one with the widths that the grown network ended with.

All three get the same data, batch size, optimizer and compute, and the same learning rate as a function of the
compute spent. Compute is counted in multiply-adds of every forward and backward pass, at the widths of the moment;
growth steps, with all that they measure, solve and try, go on the grown network's account. Growth sees training
images only, and the test images decide nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import platform
import queue
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import growkern as gk

LEARNING_RATE, WEIGHT_DECAY, BATCH_SIZE = 0.02, 0.5, 64
TEST_IMAGES = 360
POINTS = 40  # of a trajectory, evenly spaced in compute
COLOURS = {"grown": "#0b7a75", "tiny": "#d1781f", "fixed": "#3d4457"}  # of the three networks, in order of training


class MLP(nn.Module):
    """64 pixels, two hidden layers, 10 digits."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(64, first), nn.Linear(first, second), nn.Linear(second, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.fc2(F.relu(self.fc1(images.flatten(1))))))


class CNN(nn.Module):
    """Three convolutions with BatchNorm on 8×8 images, pooled to 2×2 ahead of the head."""

    def __init__(self, first: int, second: int, third: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first)
        self.conv2, self.norm2 = nn.Conv2d(first, second, 3, padding=1, bias=False), nn.BatchNorm2d(second)
        self.conv3, self.norm3 = nn.Conv2d(second, third, 3, padding=1, bias=False), nn.BatchNorm2d(third)
        self.head = nn.Linear(third * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.norm1(self.conv1(images)))
        maps = F.max_pool2d(F.relu(self.norm2(self.conv2(maps))), 2)
        maps = F.max_pool2d(F.relu(self.norm3(self.conv3(maps))), 2)
        return self.head(maps.flatten(1))


@dataclass(frozen=True)
class Recipe:
    """What a kind of network starts from, what it may spend, and how it grows."""

    widths: tuple[int, ...]
    compute: float  # multiply-adds, for each network
    neurons: int  # new units of every site in one growth step
    growth_epochs: int  # from one growth step to the next
    growth_images: int  # that a growth step measures
    max_parameters: int


BUILD: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": CNN}
RECIPES = {
    "mlp": Recipe((2, 2), compute=4e8, neurons=4, growth_epochs=4, growth_images=256, max_parameters=1700),
    "cnn": Recipe((2, 2, 2), compute=9e9, neurons=2, growth_epochs=2, growth_images=128, max_parameters=1700),
}


def digits() -> list[Tensor]:
    """Training images, test images, training labels, test labels; the split is the same in every run."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[:, None]
    parts = train_test_split(images, data.target, test_size=TEST_IMAGES, stratify=data.target, random_state=0)
    return [torch.tensor(part) for part in parts]


def moments_flops(x: Any, h: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """A multiply-add for every sample and every entry of the moments; samples are rows, or positions of a map."""
    return 2 * math.prod((h[0], *h[2:])) * sum(math.prod(shape) for shape in out_shape)


MOMENTS = ("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual")
GROWKERN_FLOPS = {getattr(torch.ops.growkern, name): moments_flops for name in MOMENTS}
GROWKERN_FLOPS[torch.ops.growkern.eigh] = lambda a, **_: 9 * math.prod(a) * a[-1]


def counted(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What `work` returns, and the multiply-adds that it took."""
    with FlopCounterMode(display=False, custom_mapping=GROWKERN_FLOPS) as counter:
        result = work(*args)
    return result, counter.get_total_flops() / 2


def cost_per_image(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds of one forward and backward pass."""
    trial = copy.deepcopy(model)
    return counted(lambda: trial(images).sum().backward())[1] / len(images)


def widths(model: nn.Module) -> list[int]:
    """Units of each hidden layer."""
    layers = [layer for layer in model.children() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return [layer.weight.shape[0] for layer in layers[:-1]]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    model.eval()
    correct = (model(images).argmax(1) == labels).double().mean()
    model.train()
    return round(100 * float(correct), 2)


def train(model: nn.Module, recipe: Recipe, seed: int, grow: bool, report: Callable[..., None]) -> dict[str, Any]:
    """Train until the compute is spent, growing on the way or not."""
    images, test_images, labels, test_labels = digits()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    options = {"neurons": recipe.neurons, "where": "all", "max_parameters": recipe.max_parameters}
    grower = gk.Grower(model, optimizer, F.cross_entropy, **options)
    start, epoch, spent, loss = time.perf_counter(), 0, 0.0, math.log(10)
    growth_steps, growth_compute = 0, 0.0
    per_image = cost_per_image(model, images[:2])
    trajectory: list[dict[str, Any]] = []

    def batches(count: int | None = None) -> list[tuple[Tensor, Tensor]]:
        chosen = torch.randperm(len(images), generator=order)[:count]
        return [(images[rows], labels[rows]) for rows in chosen.split(BATCH_SIZE)]

    def record() -> None:
        point = {"epoch": epoch, "compute": spent, "parameters": sum(p.numel() for p in model.parameters())}
        point |= {"loss": round(loss, 4), "test_accuracy": accuracy(model, test_images, test_labels)}
        trajectory.append(point)
        report("progress", done=spent / recipe.compute, widths=widths(model), **point)

    record()
    while spent < recipe.compute:
        if grow and epoch and epoch % recipe.growth_epochs == 0:
            measured = batches(recipe.growth_images)
            if not growth_steps and seed == 0:
                found = gk.bottlenecks(model, measured, F.cross_entropy)
                report("event", text=f"where it is held back, epoch {epoch}\n{found}")
            record()
            event, cost = counted(grower.step, measured)
            spent, growth_compute, growth_steps = spent + cost, growth_compute + cost, growth_steps + event.accepted
            per_image, grow = cost_per_image(model, images[:2]), event.accepted
            report("event", text=f"growth step, epoch {epoch}\n{event}")
            record()
        for x, y in batches():
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * min(spent / recipe.compute, 1))) / 2
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            optimizer.step()
            spent, loss = spent + per_image * len(x), 0.95 * loss + 0.05 * value.item()
            if spent >= recipe.compute * len(trajectory) / POINTS:
                record()
            if spent >= recipe.compute:
                break
        epoch += 1
    last = {key: trajectory[-1][key] for key in ("parameters", "compute", "loss", "test_accuracy")}
    last |= {"widths": widths(model), "train_accuracy": accuracy(model, images, labels), "epochs": epoch}
    last |= {"growth_steps": growth_steps, "growth_compute": growth_compute}
    return last | {"seconds": round(time.perf_counter() - start, 1), "trajectory": trajectory}


def start_worker(reports: Any) -> None:
    """Keep, in a worker process, the queue that the display reads."""
    global send
    send = reports.put
    torch.set_num_threads(1)


def compare(kind: str, recipe: Recipe, seed: int) -> list[dict[str, Any]]:
    """Train the grown, the tiny and the fixed network of one seed."""
    runs: dict[str, dict[str, Any]] = {}
    for network in COLOURS:
        title = f"{kind} {network}, seed {seed}"
        torch.manual_seed(seed)
        model = BUILD[kind](*(runs["grown"]["widths"] if network == "fixed" else recipe.widths))
        run = train(model, recipe, seed, network == "grown", lambda what, t=title, **facts: send((what, t, facts)))
        runs[network] = {"model": kind, "network": network, "seed": seed} | run
        send(("finished", title, run | {"trajectory": None}))
    return list(runs.values())


class Display:
    """A bar for each network in training; lines for growth steps, finished networks and, without a terminal, progress."""

    def __init__(self, console: Console) -> None:
        self.console, self.tasks, self.quarters = console, {}, {}
        columns = ("[bold]{task.description}", BarColumn(20), "{task.fields[facts]}")
        self.bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def show(self, what: str, title: str, facts: dict[str, Any]) -> None:
        if what == "event":
            self.line("green", title, facts["text"].replace("\n", "\n    "))
        elif what == "finished":
            text = "test {test_accuracy:.1f}%  widths {widths}  {epochs} epochs in {seconds:.0f} s"
            self.line("bold cyan", title, text.format(**facts))
            self.bars.remove_task(self.tasks.pop(title))
        else:
            text = "epoch {epoch}  loss {loss:.3f}  test {test_accuracy:.1f}%  widths {widths}".format(**facts)
            if title not in self.tasks:
                self.tasks[title] = self.bars.add_task(title, total=1.0, facts=text)
            self.bars.update(self.tasks[title], completed=facts["done"], facts=text)
            quarter, before = int(4 * facts["done"]), self.quarters.get(title, -1)
            if quarter > before and not self.console.is_terminal:
                self.line("dim", title, text)
            self.quarters[title] = quarter

    def line(self, style: str, title: str, text: str) -> None:
        self.console.print(f"[{style}]{title:<19}[/]", text.replace("[", r"\["), highlight=False, soft_wrap=True)


def run_all(recipes: dict[str, Recipe], seeds: int, console: Console) -> list[dict[str, Any]]:
    """Every comparison, two at a time, the longest first."""
    context = multiprocessing.get_context("spawn")
    reports, display = context.Queue(), Display(console)
    jobs = [(kind, recipe, seed) for kind, recipe in recipes.items() for seed in range(seeds)]
    jobs.sort(key=lambda job: -job[1].compute)
    with display.bars, ProcessPoolExecutor(min(2, len(jobs)), context, start_worker, (reports,)) as pool:
        futures = [pool.submit(compare, *job) for job in jobs]
        while not (all(future.done() for future in futures) and reports.empty()):
            try:
                display.show(*reports.get(timeout=0.2))
            except queue.Empty:
                continue
    return [run for future in futures for run in future.result()]


def summarise(runs: list[dict[str, Any]], kinds: list[str]) -> list[dict[str, Any]]:
    """One row for each model and network: means over its seeds."""
    rows = []
    for kind, network in ((kind, network) for kind in kinds for network in COLOURS):
        mine = [run for run in runs if (run["model"], run["network"]) == (kind, network)]
        scores = [run["test_accuracy"] for run in mine]
        averaged = ("parameters", "test_accuracy", "compute", "epochs", "growth_steps")
        row = {key: statistics.mean(run[key] for run in mine) for key in averaged}
        row["sd"] = statistics.stdev(scores) if len(scores) > 1 else 0.0
        row["widths"] = ", ".join(dict.fromkeys("-".join(map(str, run["widths"])) for run in mine))
        rows.append({"model": kind, "network": network} | row)
    return rows


def table(rows: list[dict[str, Any]], seeds: int) -> Table:
    """What a reader wants to see of the rows."""
    shown = Table(title=f"scikit-learn's digits, {TEST_IMAGES} test images, mean ± sd over {seeds} seeds")
    for heading in ("model", "network", "hidden widths"):
        shown.add_column(heading)
    for heading in ("parameters", "test accuracy", "multiply-adds", "epochs", "growth steps"):
        shown.add_column(heading, justify="right")
    for row in rows:
        numbers = [f"{row['parameters']:,.0f}", f"{row['test_accuracy']:.1f} ± {row['sd']:.1f} %"]
        numbers += [f"{row['compute']:.2g}", f"{row['epochs']:.0f}", f"{row['growth_steps']:.0f}"]
        last = row["network"] == list(COLOURS)[-1]
        shown.add_row(row["model"], row["network"], row["widths"], *numbers, end_section=last)
    return shown


def draw(runs: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy against parameters: the ways of the grown networks, and where all three end."""
    kinds = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5.4 * len(kinds), 4.8), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for run in runs:
            if (run["model"], run["network"]) == (kind, "grown"):
                way = [(point["parameters"], point["test_accuracy"]) for point in run["trajectory"]]
                axis.plot(*zip(*way, strict=True), color=COLOURS["grown"], alpha=0.4, linewidth=1.3)
        for row in rows:
            if row["model"] == kind:
                axis.errorbar(
                    row["parameters"], row["test_accuracy"], row["sd"], fmt="o", color=COLOURS[row["network"]]
                )
        axis.set_title(kind.upper(), loc="left", fontweight="bold")
        axis.set_xlabel("parameters")
        axis.set_xscale("log")
        axis.set_yscale("function", functions=(lambda a: -np.log10(101 - a), lambda b: 101 - 10**-b))
        axis.set_ylim(5, 100)
        axis.set_yticks([10, 50, 80, 90, 95, 98, 100])
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test accuracy in %")
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for digits.json and digits.png")
    parser.add_argument("--seeds", type=int, default=3, help="how many of each network")
    parser.add_argument("--models", default="mlp,cnn", help="mlp, cnn or both")
    parser.add_argument("--quick", action="store_true", help="a few seconds of it, to see that it runs")
    args = parser.parse_args()
    kinds = args.models.split(",")
    if args.seeds < 1 or not set(kinds) <= set(RECIPES):
        parser.error("expected --seeds of 1 or more, and --models of mlp, cnn")
    shrink = {"growth_epochs": 1} if args.quick else {}
    recipes = {kind: replace(RECIPES[kind], **shrink) for kind in kinds}
    if args.quick:
        recipes = {kind: replace(recipe, compute=recipe.compute / 20) for kind, recipe in recipes.items()}
    console = Console(width=None if sys.stdout.isatty() else 110)
    start = time.perf_counter()
    runs = run_all(recipes, args.seeds, console)
    rows = summarise(runs, kinds)
    results = {
        "command": " ".join(["python", "examples/digits.py", *sys.argv[1:]]),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {module.__name__: module.__version__ for module in (gk, torch, sklearn, np)},
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "config": {kind: asdict(recipe) for kind, recipe in recipes.items()},
        "table": rows,
        "runs": runs,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "digits.json").write_text(json.dumps(results) + "\n")
    draw(runs, rows, args.out / "digits.png")
    console.print(table(rows, args.seeds))
    console.print(f"{results['seconds']:.0f} s; digits.json and digits.png are in {args.out}")


if __name__ == "__main__":
    main()
