"""gromo's example scripts as they are and with `growkern.gromo.accelerate()`: seconds in statistics and updates.

python bench/gromo_examples.py FOLDER [SCRIPT ...] [--rounds N] [--results FOLDER]

FOLDER is `examples` of a checkout of gromo's repository: its source distribution has no scripts. Each script runs in
processes of its own, in both ways in turns. What is counted are the outermost calls of gromo's methods of `COUNTED`;
times are those of a wall clock, with OMP_NUM_THREADS=1 the processor's.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import results
import torch
from clock import Clock
from gromo_suite import define_torchvision_ops
from machine import folder, run_record
from race import quartiles, ratio, significant

SCRIPTS = ("plot_growing_module_tutorial.py", "plot_growing_container_tutorial.py", "plot_growing_graph_tutorial.py")
# What all other containers inherit or call; to import them all takes seconds.
MODULES = (
    "gromo.modules.growing_module",
    "gromo.modules.linear_growing_module",
    "gromo.modules.conv2d_growing_module",
    "gromo.containers.growing_container",
    "gromo.containers.growing_block",
)
COUNTED = {
    "update_computation": "statistics",
    "compute_optimal_delta": "updates",
    "compute_optimal_updates": "updates",
    "compute_optimal_added_parameters": "updates",
}
LOSS = re.compile(r"(?:loss|error)[^\d\n-]*(-?\d[\d.]*(?:e[+-]?\d+)?)", re.IGNORECASE)
WAYS = {"off": "gromo", "on": "gromo, accelerated"}


def count(now: Callable[[], float]) -> dict[str, float]:
    """Have gromo's methods add their seconds to what this returns; those that call each other count once."""
    taken = {"statistics": 0.0, "updates": 0.0}
    running: list[str] = []

    def counted(original: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(original)
        def method(*args: Any, **named: Any) -> Any:
            if running:
                return original(*args, **named)
            running.append(part)
            start = now()
            try:
                return original(*args, **named)
            finally:
                taken[running.pop()] += now() - start

        return method

    for module in map(importlib.import_module, MODULES):
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                for name in COUNTED.keys() & vars(kind).keys():
                    setattr(kind, name, counted(vars(kind)[name], COUNTED[name]))
    return taken


def run(script: Path, switch: str) -> dict[str, Any]:
    """One script in this process: seconds in all and counted, memory, and the last loss that it prints."""
    define_torchvision_ops()
    if switch == "on":
        from growkern.gromo import accelerate

        accelerate()
    clock = Clock("cpu")
    taken, said = count(clock.now), io.StringIO()
    torch.manual_seed(0)  # not all of them begin with a seed
    sys.path.insert(0, str(script.parent))  # where its helpers are
    start = clock.now()
    with contextlib.redirect_stdout(said):
        _, peak = clock.memory(lambda: runpy.run_path(str(script), run_name="__main__"))
    losses = LOSS.findall(said.getvalue())
    if not losses:
        raise RuntimeError(f"{script.name} prints no loss")
    return {"all": clock.now() - start, "MiB": round(peak / 2**20, 2), "loss": float(losses[-1]), **taken}


def process(script: Path, switch: str) -> dict[str, Any]:
    environment = dict(os.environ, MPLBACKEND="agg")
    command = [sys.executable, __file__, str(script), "--switch", switch]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"{script.name}: {said.stderr.strip()[-500:]}")
    return json.loads(said.stdout.splitlines()[-1])


def measured(script: Path, rounds: int) -> dict[str, Any]:
    """A row: both ways of a script."""
    found: dict[str, list[dict[str, Any]]] = {switch: [] for switch in WAYS}
    for _ in range(rounds):
        for switch, runs in found.items():
            runs.append(process(script, switch))
    spent = {switch: [each["statistics"] + each["updates"] for each in runs] for switch, runs in found.items()}
    ways = []
    for switch, runs in found.items():
        median, low, high = (significant(1e3 * each) for each in quartiles(spent[switch]))
        way = {"way": WAYS[switch], "kind": "growkern" if switch == "on" else "gromo", "ms": median}
        way |= {"low": low, "high": high, "rounds": rounds, "MiB": max(each["MiB"] for each in runs)}
        for part in ("statistics", "updates", "all"):
            way[f"{part}, ms"] = significant(1e3 * quartiles([each[part] for each in runs])[0])
        way["loss"] = runs[-1]["loss"]
        ways.insert(0, way)
    on, off = (way["loss"] for way in ways)
    ways[0] |= {"error": significant(abs(on - off) / abs(off))}
    ways[0] |= {"over": {"gromo": ratio(spent["off"], spent["on"])}}
    described = {"op": "gromo_example", "dtype": "float32", "precision": "ieee", "device": "cpu"}
    return {**described, "case": script.stem, "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", type=Path, metavar="FOLDER")
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", default=SCRIPTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--switch", choices=WAYS, help=argparse.SUPPRESS)  # in a process of a script
    chosen = parser.parse_args()
    if chosen.switch:
        print(json.dumps(run(chosen.where, chosen.switch)))
        return
    record = run_record("cpu", Clock("cpu"))
    for script in chosen.scripts:
        row = measured(chosen.where / script, chosen.rounds)
        results.store(chosen.results / folder(record["hardware"]) / "gromo_examples.json", record, row)
        own, other = row["ways"]
        print(f"{script}: {other['ms']:g} ms, accelerated {own['ms']:g} ms, losses {other['loss']:g}, {own['loss']:g}")


if __name__ == "__main__":
    main()
