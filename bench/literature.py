"""Methods of the literature side by side: GradMax's teacher and student, and Fashion-MNIST; and where growing stops.

usage: python bench/literature.py teacher-student [--seeds N]
       python bench/literature.py stopping [--seeds N]
       python bench/literature.py fashion-mnist --data-root DIR [--seeds N] [--runs DIR]

A row is kept in bench/results/literature as soon as its run has ended, and rows that are there are not made again, so
that an interrupted comparison goes on when it is called again. One thread each.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import nn

import growkern as gk
from growkern.training import Run, Settings, resume, train

RESULTS = Path(__file__).parent / "results" / "literature"
SMALL, FIXED = "small", "fixed"  # never grows; has the final widths of `tiny` from the start

Row = dict[str, Any]
Job = tuple[Row, Callable[[], Row]]

# Evci et al. 2022, section 4.1: a student of 5 hidden units grows to the 10 of its teacher, a unit at a time.
INPUTS, HIDDEN, OUTPUTS, START = 20, 10, 10, 5
SAMPLES, STEPS, RATE = 1000, 1500, 0.1
GROWTH = range(200, 1001, 200)
# Across a kink at 0 `gradmax` adds ± pairs, so that there every growth is of two units.
ACTIVATIONS: dict[str, tuple[type[nn.Module], int]] = {"tanh": (nn.Tanh, 1), "relu": (nn.ReLU, 2)}
STUDENTS = ("gradmax", "random", "tiny", "joint", SMALL)

# Students of one unit that grow by neurons="auto", at a minimum before and after each growth, until they get none.
TEACHERS, ROWS, NOISE, UNSEEN = (2, 4, 8), (1000, 4000, 16000), 0.3, 10000

# As the MLP of examples/compare.py, with two fifths of its compute: about half a minute for each run.
PLAN: Row = {
    "dataset": "fashion-mnist", "model": "mlp", "width": 4, "neurons": "4", "schedule": "every:2", "where": "all",
    "measured": 1024, "max_parameters": 14000, "compute": 1.2e6, "batch": 256, "learning_rate": 3e-3,
    "weight_decay": 0.3, "threads": 1,
}  # fmt: skip
METHODS = ("tiny", "joint", "gradmax", "fisher", "random", FIXED)
VALUES = {"teacher-student": "loss", "stopping": "width", "fashion-mnist": "accuracy"}


def taught(activation: str, method: str, seed: int, samples: int = SAMPLES) -> float:
    """Loss of a student at the end of its training, on the samples that it was trained on."""
    torch.manual_seed(seed)
    kind, neurons = ACTIVATIONS[activation]

    def network(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, hidden, bias=False), kind(), nn.Linear(hidden, OUTPUTS, bias=False))

    teacher, x = network(HIDDEN), torch.randn(samples, INPUTS)
    for weight in teacher.parameters():
        nn.init.uniform_(weight, -1, 1)
    y = teacher(x).detach()
    student = network(START)
    optimizer = torch.optim.SGD(student.parameters(), RATE)
    options: Row = {} if method == SMALL else {"method": method, "neurons": neurons}
    grower = gk.Grower(student, optimizer, F.mse_loss, **options)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        F.mse_loss(student(x), y).backward()
        optimizer.step()
        if step in GROWTH and method != SMALL:
            grower.step([(x, y)])
    return F.mse_loss(student(x), y).item()


def students(seeds: int) -> Iterator[Job]:
    for seed in range(seeds):
        for activation in ACTIVATIONS:
            for method in STUDENTS:
                key = {"activation": activation, "method": method, "seed": seed}
                yield key, lambda key=key: {"loss": taught(**key)}  # type: ignore[misc]


def settled(student: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    """The student, at a minimum of its squared error."""
    optimizer = torch.optim.LBFGS(
        student.parameters(), max_iter=400, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.mse_loss(student(x), y)
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)
    return student


def stopped(teacher: int, samples: int, seed: int, unseen: int = UNSEEN) -> Row:
    """Widths of a student that grows as long as neurons stand above chance; mean squared errors to the teacher."""
    torch.manual_seed(seed)

    def network(hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()

    says, x = network(teacher), torch.randn(samples + unseen, 8, dtype=torch.float64)
    for parameter in says.parameters():
        parameter.data.mul_(2)
    wanted = says(x).detach()
    heard = (wanted + NOISE * torch.randn_like(wanted))[:samples]
    batches = list(zip(x[:samples].chunk(8), heard.chunk(8), strict=True))

    def error(student: nn.Sequential) -> float:
        return F.mse_loss(student(x[samples:]), wanted[samples:]).item()

    grown, widths = settled(network(1), x[:samples], heard), [1]
    while gk.Grower(grown, torch.optim.SGD(grown.parameters(), RATE), F.mse_loss).step(batches).neurons:
        widths.append(settled(grown, x[:samples], heard)[0].out_features)
    fixed = settled(network(teacher), x[:samples], heard)
    return {"widths": widths, "width": widths[-1], "error": error(grown), "as wide as the teacher": error(fixed)}


def stops(seeds: int) -> Iterator[Job]:
    for seed in range(seeds):
        for samples in ROWS:
            for teacher in TEACHERS:
                key = {"teacher": teacher, "samples": samples, "seed": seed}
                yield key, lambda key=key: stopped(**key)  # type: ignore[misc]


def trained(method: str, seed: int, data_root: str, folder: Path) -> Row:
    """Accuracy on the test images of a network that was trained by `PLAN`."""
    own: Row = {"seed": seed, "data_root": data_root, "method": "none" if method == FIXED else method}
    if method == FIXED:
        own["like"] = str(folder / f"tiny-seed{seed}")
    run = folder / f"{method}-seed{seed}"
    if (run / "config.json").exists():
        resume(run)
    else:
        train(Settings(**PLAN | own), run)
    end = Run(run).records("metrics.jsonl")[-1]
    return {"accuracy": end["accuracy"], "parameters": end["parameters"], "widths": list(end["widths"].values()),
            "compute": end["compute"], "epochs": end["epoch"], "seconds": end["seconds"]}  # fmt: skip


def fashion(seeds: int, data_root: str, folder: Path) -> Iterator[Job]:
    for seed in range(seeds):
        for method in METHODS:
            key = {"method": method, "seed": seed}
            yield key, lambda key=key: trained(**key, data_root=data_root, folder=folder)  # type: ignore[misc]


def summary(rows: list[Row], value: str) -> list[str]:
    """One line for each method, or teacher and number of samples: the mean over seeds and its 95% interval."""

    def kind(row: Row) -> str:
        return " ".join(str(row[name]) for name in ("activation", "method", "teacher", "samples") if name in row)

    lines = []
    for name in dict.fromkeys(map(kind, rows)):
        values = [row[value] for row in rows if kind(row) == name]
        centre, half = statistics.mean(values), float("nan")
        if len(values) > 1:
            half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        lines.append(f"{name}: {value} {centre:.4g} ± {half:.2g}, {len(values)} seeds")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(VALUES))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--runs", type=Path, default=Path("runs/literature"), help="folder for the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = {
        "teacher-student": students(args.seeds or 10),
        "stopping": stops(args.seeds or 10),
        "fashion-mnist": fashion(args.seeds or 5, args.data_root, args.runs),
    }[args.what]
    path = RESULTS / f"{args.what}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    for key, job in jobs:
        if any(key.items() <= row.items() for row in rows):
            continue
        rows.append(key | job())
        print(rows[-1], flush=True)
        facts = {"command": f"python bench/literature.py {args.what}", "torch": torch.__version__}
        facts |= {"plan": PLAN} if args.what == "fashion-mnist" else {}
        written = path.with_suffix(".new")
        written.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        written.replace(path)
    print("\n".join(summary(rows, VALUES[args.what])))


if __name__ == "__main__":
    main()
