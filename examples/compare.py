"""Grow networks on real images, beside one that never grows and one that has the final widths at once.

usage: python examples/compare.py [--dataset digits|fashion-mnist] [--data-root DIR] [--models mlp,cnn] [--seeds N]
                                  [--out DIR] [--validation] [--quick]

Each of the three spends the same compute: the multiply-adds of all forward and backward passes and, for the grown
network, of its growth steps. Growth sees training images only; the test images only measure. With --validation a
sixth of the training images stands for the test images, to choose plans by. Called again with the --out of a comparison
that was interrupted, it goes on with it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import queue
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import scipy.stats
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import growkern
from growkern.backend import available
from growkern.training import Run, Settings, Watcher, resume, train
from growkern.training.report import write_report

KINDS = ("grown", "fixed", "tiny")
COMMON = {"where": "all", "threads": 1}
PLANS = {
    ("digits", "mlp"): {
        "width": 2, "neurons": "4", "schedule": "every:4", "measured": 256, "max_parameters": 1700,
        "compute": 2.8e5, "batch": 64, "learning_rate": 1e-2, "weight_decay": 0.5,
    },
    ("digits", "cnn"): {
        "width": 2, "neurons": "2", "schedule": "every:2", "measured": 128, "max_parameters": 1700,
        "compute": 1.5e6, "batch": 64, "learning_rate": 1e-2, "weight_decay": 0.5,
    },
    ("fashion-mnist", "mlp"): {
        "width": 4, "neurons": "4", "schedule": "every:4", "measured": 1024, "max_parameters": 14000,
        "compute": 3e6, "batch": 256, "learning_rate": 3e-3, "weight_decay": 0.3,
    },
    ("fashion-mnist", "cnn"): {
        "width": 4, "neurons": "8", "schedule": "every:1", "measured": 512, "max_parameters": 3900,
        "compute": 1.2e7, "batch": 128, "learning_rate": 1e-2, "weight_decay": 0.1,
    },
}  # fmt: skip


class Teller(Watcher):
    """Sends what happens to the process that shows it."""

    def __init__(self, key, messages):
        self.key, self.messages, self.told = key, messages, 0.0

    def batch(self, share):
        if time.monotonic() - self.told > 0.3:
            self.told = time.monotonic()
            self.messages.put((self.key, share, None))

    def epoch(self, record):
        widths = "-".join(map(str, record["widths"].values()))
        text = f"epoch {record['epoch']}, loss {record['loss']:.3f}, accuracy {record['accuracy']:.1f}, widths {widths}"
        self.messages.put((self.key, None, text))

    def growth(self, epoch, event):
        if event.accepted:
            self.messages.put((self.key, "grown", f"epoch {epoch}: " + str(event).replace("\n", "; ")))


def run(settings, kinds, folder, messages):
    """Train networks of one model and seed; the fixed one takes the final widths of the grown one before it."""
    for kind in kinds:
        own = {} if kind == "grown" else {"method": "none"}
        if kind == "fixed":
            own |= {"like": str(folder / f"{settings['model']}-grown-seed{settings['seed']}")}
        key = f"{settings['model']}-{kind}-seed{settings['seed']}"
        wanted = Settings(**settings | own, name=f"{settings['model']} {kind}")
        if not (folder / key / "config.json").exists():
            train(wanted, folder / key, [Teller(key, messages)])
        elif Run(folder / key).settings == wanted.anchored():
            resume(folder / key, [Teller(key, messages)])
        else:
            raise ValueError(f"{folder / key} was made with other settings; choose another --out")
        messages.put((key, 1.0, None))


def run_all(plans, seeds, folder, console):
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
            pool.apply_async(run, ({**plan, "seed": seed}, kinds, folder, messages))
            for kinds in (("grown", "fixed"), ("tiny",))
            for plan in reversed(plans)
            for seed in range(seeds)
        ]
        bars, last = {}, {}
        while not (messages.empty() and all(job.ready() for job in jobs)):
            try:
                key, share, text = messages.get(timeout=0.2)
            except queue.Empty:
                continue
            if key not in bars:
                bars[key] = progress.add_task(key, total=1.0, text="")
            if share == "grown":
                progress.console.print(f"[green]{key}[/]: {text}", highlight=False)
            elif share is None:
                last[key] = text
                progress.update(bars[key], text=text)
            else:
                progress.update(bars[key], completed=min(share, 1.0))
                if share >= 1 and not console.is_terminal:
                    console.print(f"{key}: {last.get(key, 'was complete')}", highlight=False)
        for job in jobs:
            job.get()


def rows_of(folder, plans, seeds):
    """One row for each run: how it ended, how it got there, what grew."""
    rows = []
    for model in (plan["model"] for plan in plans):
        for kind in KINDS:
            for seed in range(seeds):
                found = Run(folder / f"{model}-{kind}-seed{seed}")
                epochs, growth = found.records("metrics.jsonl"), found.records("growth.jsonl")
                end = epochs[-1]
                rows.append({
                    "model": model, "kind": kind, "seed": seed, "widths": list(end["widths"].values()),
                    "parameters": end["parameters"], "accuracy": round(end["accuracy"], 2), "loss": end["loss"],
                    "epochs": end["epoch"], "compute": end["compute"], "seconds": end["seconds"],
                    "growth_steps": sum(step["accepted"] for step in growth),
                    "track": [(e["parameters"], round(e["compute"]), round(e["accuracy"], 2)) for e in epochs],
                })  # fmt: skip
    return rows


def summarise(rows):
    """One line for each model and kind: means over seeds, the spread of accuracy, and its distance from fixed."""
    lines = []
    for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in rows):
        some = [row for row in rows if (row["model"], row["kind"]) == (model, kind)]
        fixed = [row for row in rows if (row["model"], row["kind"]) == (model, "fixed")]
        mean = {
            key: statistics.mean(row[key] for row in some) for key in ("parameters", "accuracy", "compute", "epochs")
        }
        spread = statistics.stdev(row["accuracy"] for row in some) if len(some) > 1 else 0.0
        shapes = ", ".join(dict.fromkeys("-".join(map(str, row["widths"])) for row in some))
        line = {"model": model, "kind": kind, "widths": shapes, **mean, "spread": spread}
        if kind == "grown" and len(some) > 1:
            differences = [a["accuracy"] - b["accuracy"] for a, b in zip(some, fixed, strict=True)]
            centre, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
            half = scipy.stats.t.ppf(0.975, len(differences) - 1) * error
            line |= {"minus_fixed": centre, "interval_95": [centre - half, centre + half]}
        lines.append(line)
    return lines


def table(lines):
    result = Table(title="Accuracy at equal compute, mean ± standard deviation over seeds")
    for column in ("model", "network", "widths", "parameters", "accuracy, %", "multiply-adds / image", "epochs"):
        is_text = column in ("model", "network", "widths")
        result.add_column(column, no_wrap=column != "widths", justify="left" if is_text else "right")
    for line in lines:
        score = f"{line['accuracy']:.2f} ± {line['spread']:.2f}"
        figures = (f"{line['parameters']:.0f}", score, f"{line['compute']:.3g}", f"{line['epochs']:.0f}")
        result.add_row(line["model"], line["kind"], line["widths"], *figures, end_section=line["kind"] == "tiny")
    return result


def picture(rows, lines, title, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    colours = {"grown": "#1b7f5c", "fixed": "#44519e", "tiny": "#c9622b"}
    marks = {"grown": ("o", 6), "fixed": ("s", 11), "tiny": ("^", 8)}
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.4 * len(names), 4.4), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        for line in (line for line in lines if line["model"] == name):
            kind = line["kind"]
            some = [row for row in rows if (row["model"], row["kind"]) == (name, kind)]
            for row in some if kind == "grown" else ():
                sizes, _, scores = zip(*row["track"], strict=True)
                axis.plot(sizes, scores, color=colours[kind], alpha=0.4, linewidth=1.3)
            at = [row["parameters"] for row in some], [row["accuracy"] for row in some]
            label = f"{kind}: {line['accuracy']:.1f} ± {line['spread']:.1f} %"
            face = "none" if kind == "fixed" else colours[kind]  # a frame, as grown networks end where they are
            mark, size = marks[kind]
            axis.plot(*at, mark, color=colours[kind], markersize=size, markerfacecolor=face, label=label)
        axis.set(title=name.upper(), xlabel="parameters", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower right", frameon=False)
    axes[0][0].set_ylabel("accuracy on held-out images, %")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", choices=sorted({dataset for dataset, _ in PLANS}))
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--out", type=Path, help="folder for runs and results; by default a new one under runs/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", default="mlp,cnn", type=lambda text: text.split(","))
    parser.add_argument("--validation", action="store_true", help="test on a sixth of the training images instead")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the compute, to see that it runs")
    args = parser.parse_args()
    if unknown := {model for model in args.models if (args.dataset, model) not in PLANS}:
        parser.error(f"--models: expected some of mlp, cnn, got {', '.join(sorted(unknown))}")
    shared = COMMON | {"dataset": args.dataset, "data_root": args.data_root, "validation": args.validation}
    plans = [{**shared, "model": model, **PLANS[args.dataset, model]} for model in args.models]
    if args.quick:
        plans = [{**plan, "compute": plan["compute"] / 20, "schedule": "every:1"} for plan in plans]
    out = args.out or Path("runs") / time.strftime(f"{args.dataset}-%Y%m%d-%H%M%S")
    console, start = Console(width=None if sys.stdout.isatty() else 120), time.perf_counter()
    run_all(plans, args.seeds, out, console)
    seconds, rows = time.perf_counter() - start, rows_of(out, plans, args.seeds)
    lines = summarise(rows)
    facts = {
        "command": " ".join(["python", *sys.argv]), "backend": available("conv2d_moments")[0], "cores": os.cpu_count(),
        "machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
        "growkern": growkern.__version__, "plans": {plan["model"]: asdict(Settings(**plan)) for plan in plans},
        "summary": lines,
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(facts | {"rows": rows}) + "\n")
    picture(rows, lines, f"{args.dataset} at equal compute; lines follow the grown networks", out / "results.png")
    console.print(table(lines))
    for line in lines:
        if "minus_fixed" in line:
            low, high = line["interval_95"]
            console.print(
                f"{line['model']}: grown − fixed {line['minus_fixed']:+.2f} points, 95% [{low:+.2f}, {high:+.2f}]"
            )
    for model in args.models:
        report = write_report(sorted(out.glob(f"{model}-*-seed*")), out / f"{model}.html")
        console.print(f"report: {report}")
    console.print(f"{seconds:.0f} s; figures in {out / 'results.json'}, picture in {out / 'results.png'}")


if __name__ == "__main__":
    main()
