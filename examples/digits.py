"""Grow networks on scikit-learn's digits, beside one that never grows and one that has the final widths at once.

usage: python examples/digits.py [--out DIR] [--seeds N] [--models mlp,cnn] [--quick]

Each of the three spends the same compute: the multiply-adds of all forward and backward passes and, for the grown
network, of its growth steps. Growth sees training images only; the test images only measure.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import platform
import queue
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import growkern as gk

KINDS = ("grown", "fixed", "tiny")


def mlp(a, b):
    return nn.Sequential(nn.Linear(64, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))


def cnn(a, b, c):
    def block(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), *block(1, a), *block(a, b), nn.MaxPool2d(2)),
        *(*block(b, c), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * c, 10)),
    )


BUILD = {"mlp": mlp, "cnn": cnn}


@dataclass(frozen=True)
class Plan:
    """How one model is trained and grown."""

    start: tuple[int, ...]  # widths
    compute: float  # budget, in multiply-adds for each training image
    every: int  # epochs between growth steps
    measured: int  # training images that a growth step sees
    grow: dict = field(default_factory=dict)
    weight_decay: float = 0.5
    grow_until: float = 0.5  # of the compute
    learning_rate: float = 1e-2
    batch: int = 64


PLANS = {
    "mlp": Plan((2, 2), 2.8e5, 4, 256, {"neurons": 4, "where": "all", "max_parameters": 1700}),
    "cnn": Plan((2, 2, 2), 6e6, 2, 128, {"neurons": 2, "where": "all", "max_parameters": 1700}),
}


def digits():
    """Training images and labels, test images and labels."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    return x, y, x_test, y_test


def multiply_adds(work):
    """Multiply-adds of `work()`: PyTorch's own count, and for growkern's ops one for each entry, position and image."""

    def second_moments(_, h, *rest, out_shape, **options):
        return 2 * h[0] * math.prod(h[2:]) * sum(map(math.prod, out_shape))

    ops = torch.ops.growkern
    counted = {op: second_moments for op in (ops.linear_moments, ops.conv2d_moments)}
    counted |= {op: second_moments for op in (ops.linear_residual, ops.conv2d_residual)}
    counted |= {ops.eigh: lambda a, **options: 18 * math.prod(a) * a[-1]}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        result = work()
    return counter.get_total_flops() / 2, result


def cost_per_image(model):
    """Multiply-adds of one forward and backward pass of one image."""
    copied = copy.deepcopy(model)
    cost, _ = multiply_adds(lambda: copied(torch.zeros(4, 64)).logsumexp(1).sum().backward())
    return cost / 4


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        correct = (model(x).argmax(1) == y).double().mean().item()
    model.train()
    return 100 * correct


def widths(model):
    return [m.weight.shape[0] for m in model if isinstance(m, nn.Linear | nn.Conv2d)][:-1]


def train(model, plan, seed, grows, report):
    """Train until the budget is spent; return what happened on the way."""
    x, y, x_test, y_test = digits()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
    grower = gk.Grower(model, optimizer, F.cross_entropy, **plan.grow) if grows else None
    budget, spent, cost, epoch = plan.compute * len(x), 0.0, cost_per_image(model), 0
    track, events = [], []
    while spent < budget:
        if grower and epoch and epoch % plan.every == 0 and spent < plan.grow_until * budget:
            chosen = torch.randperm(len(x), generator=order)[: plan.measured]
            growth_cost, event = multiply_adds(lambda chosen=chosen: grower.step([(x[chosen], y[chosen])]))
            spent, cost = spent + growth_cost, cost_per_image(model)
            events += [{"epoch": epoch, "text": line} for line in str(event).splitlines()]
            report(None, str(event) if event.accepted else "")
        total = 0.0
        for batch in torch.randperm(len(x), generator=order).split(plan.batch):
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * (1 + math.cos(math.pi * min(1.0, spent / budget))) / 2
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            total, spent = total + loss.item() * len(batch), spent + cost * len(batch)
        epoch += 1
        parameters = sum(p.numel() for p in model.parameters())
        track.append((parameters, round(spent / len(x)), round(accuracy(model, x_test, y_test), 2)))
        report(
            spent / budget, f"epoch {epoch}, loss {total / len(x):.3f}, accuracy {track[-1][2]:.1f}, {widths(model)}"
        )
    return {
        "widths": widths(model), "parameters": track[-1][0], "accuracy": track[-1][2], "loss": total / len(x),
        "epochs": epoch, "compute": spent / len(x), "events": events, "track": track,
    }  # fmt: skip


def run(name, plan, seed, kinds, messages):
    """Train networks of one seed; a fixed one has the final widths of the grown one before it."""
    torch.set_num_threads(1)
    rows, final = [], None
    for kind in kinds:
        torch.manual_seed(seed)
        model = BUILD[name](*(final if kind == "fixed" else plan.start))
        start = time.perf_counter()

        def report(share, text, kind=kind):
            messages.put(((name, kind, seed), share, text))

        row = train(model, plan, seed, kind == "grown", report)
        final = final or row["widths"]
        rows.append({"model": name, "kind": kind, "seed": seed, **row, "seconds": time.perf_counter() - start})
    return rows


def run_all(plans, seeds, console):
    """Run every model and seed in two processes, with a progress bar for each network."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(2) as pool, Progress(*columns, console=console) as progress:
        messages = manager.Queue()
        jobs = [
            pool.apply_async(run, (name, plan, seed, kinds, messages))
            for kinds in (("tiny",), ("grown", "fixed"))  # the longest first
            for name, plan in reversed(plans.items())
            for seed in seeds
        ]
        bars = {}
        while not (messages.empty() and all(job.ready() for job in jobs)):
            try:
                key, share, text = messages.get(timeout=0.2)
            except queue.Empty:
                continue
            label = f"{key[0]} {key[1]}, seed {key[2]}"
            if key not in bars:
                bars[key] = progress.add_task(label, total=1.0, text="")
            if share is None and text:
                progress.console.print(f"[green]{label}[/]: " + text.replace("\n", f"\n[green]{label}[/]: "))
            elif share is not None:
                progress.update(bars[key], completed=min(share, 1.0), text=text)
                if share >= 1 and not console.is_terminal:
                    console.print(f"{label}: {text}")
        rows = [row for job in jobs for row in job.get()]
    return sorted(rows, key=lambda row: (list(plans).index(row["model"]), KINDS.index(row["kind"]), row["seed"]))


def summarise(rows):
    """One line for each model and kind: means over seeds, and the spread of accuracy."""
    lines = []
    for name, kind in dict.fromkeys((row["model"], row["kind"]) for row in rows):
        some = [row for row in rows if (row["model"], row["kind"]) == (name, kind)]
        mean = {
            key: statistics.mean(row[key] for row in some) for key in ("parameters", "accuracy", "compute", "epochs")
        }
        spread = statistics.stdev(row["accuracy"] for row in some) if len(some) > 1 else 0.0
        shapes = ", ".join(dict.fromkeys("-".join(map(str, row["widths"])) for row in some))
        lines.append({"model": name, "kind": kind, "widths": shapes, **mean, "spread": spread})
    return lines


def table(lines):
    result = Table(title="Test accuracy at equal compute, mean ± standard deviation over seeds")
    for column in ("model", "network", "widths", "parameters", "accuracy, %", "multiply-adds / image", "epochs"):
        result.add_column(
            column, no_wrap=column != "widths", justify="left" if column in ("model", "network", "widths") else "right"
        )
    for line in lines:
        score = f"{line['accuracy']:.2f} ± {line['spread']:.2f}"
        figures = (f"{line['parameters']:.0f}", score, f"{line['compute']:.3g}", f"{line['epochs']:.0f}")
        result.add_row(line["model"], line["kind"], line["widths"], *figures, end_section=line["kind"] == "tiny")
    return result


def picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours, marks = (
        {"grown": "#1b7f5c", "fixed": "#44519e", "tiny": "#c9622b"},
        {"grown": "o", "fixed": "s", "tiny": "^"},
    )
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.4 * len(names), 4.4), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        for line in (line for line in summarise(rows) if line["model"] == name):
            kind = line["kind"]
            some = [row for row in rows if (row["model"], row["kind"]) == (name, kind)]
            for row in some if kind == "grown" else ():
                sizes, _, scores = zip(*row["track"], strict=True)
                axis.plot(sizes, scores, color=colours[kind], alpha=0.4, linewidth=1.3)
            at = [row["parameters"] for row in some], [row["accuracy"] for row in some]
            label = f"{kind}: {line['accuracy']:.1f} ± {line['spread']:.1f} %"
            axis.plot(*at, marks[kind], color=colours[kind], markersize=8, markeredgecolor="white", label=label)
        axis.set(title=name.upper(), xlabel="parameters", xscale="log", ylim=(0, 102))
        axis.set_xticks([200, 500, 1000, 2000], ["200", "500", "1,000", "2,000"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower right", frameon=False)
    axes[0][0].set_ylabel("test accuracy, %")
    figure.suptitle("Handwritten digits at equal compute; lines follow the grown networks on their way")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", default="mlp,cnn", type=lambda text: text.split(","))
    parser.add_argument("--quick", action="store_true", help="a hundredth of the compute, to see that it runs")
    args = parser.parse_args()
    if unknown := set(args.models) - set(PLANS):
        parser.error(f"--models: expected some of {', '.join(PLANS)}, got {', '.join(sorted(unknown))}")
    plans = {name: PLANS[name] for name in args.models}
    if args.quick:
        plans = {name: replace(plan, compute=plan.compute / 100, every=1) for name, plan in plans.items()}
    console, start = Console(width=None if sys.stdout.isatty() else 120), time.perf_counter()
    rows = run_all(plans, range(args.seeds), console)
    seconds = time.perf_counter() - start
    lines = summarise(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": " ".join(["python", *sys.argv]), "seconds": round(seconds, 1), "cores": os.cpu_count(),
        "machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
        "growkern": gk.__version__, "plans": {name: asdict(plan) for name, plan in plans.items()}, "summary": lines,
    }  # fmt: skip
    (args.out / "digits.json").write_text(json.dumps(facts | {"rows": rows}) + "\n")
    picture(rows, args.out / "digits.png")
    console.print(table(lines))
    console.print(f"{seconds:.0f} s; figures in {args.out / 'digits.json'}, picture in {args.out / 'digits.png'}")


if __name__ == "__main__":
    main()
