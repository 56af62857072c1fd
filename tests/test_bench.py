"""The bench suite runs, times nothing that is wrong, and the documents quote its results."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Case, cases, error
from torch import Tensor

from growkern import use_backend

ROOT = Path(__file__).parent.parent
CEILINGS = {"GB/s": 10.0, "TFLOP/s float32": 0.1}
DESCRIBED = {"op": "sum", "case": "a", "dtype": "float32", "precision": "ieee", "device": "cpu"}
GEOMETRIES = ("3×3", "stride 2", "dilation 2", "consumer stride 2", "nothing square")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


class Rounds:
    """What the suite uses of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            run()


def test_one_row_of_the_suite(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "bench/bench_moments.py", "-q", "-p", "no:cacheprovider"]
    command += ["--device", "cpu", "--size", "test", "--budget", "0.1", "--rounds", "3", "--results", tmp_path]
    command += ["-k", "linear_moments and 33 and float32", "--benchmark-json", tmp_path / "pytest-benchmark.json"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # which on a busy machine is faster
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert said.returncode == 0, said.stdout
    (path,) = tmp_path.glob("*/moments.json")
    record = json.loads(path.read_text())
    (row,) = record["rows"]
    run = record["runs"][row["run"]]
    assert run["versions"]["torch"] == torch.__version__
    ways = {way["way"]: way for way in row["ways"]}
    own = row["ways"][0]
    assert own["kind"] == "growkern"
    assert own["way"] in said.stdout
    assert {"six products", "one product"} <= ways.keys()
    assert all(0 < way["error"] < 1e-5 for way in row["ways"] if "ms" in way)
    rows, widths = 33, (63, 33 + 1, 1)
    moments = [widths[i] * widths[j] for i in range(3) for j in range(i, 3)]
    assert row["GFLOP"] == pytest.approx(2 * rows * sum(moments) / 1e9, rel=0.05)
    assert row["MB"] == pytest.approx(4 * (rows * (63 + 33 + 1) + sum(moments)) / 1e6, rel=1e-3)
    assert own["GB/s"] == pytest.approx(row["MB"] / own["ms"], rel=2e-3)
    limits = row["MB"] / run["ceilings"]["GB/s"], row["GFLOP"] / run["ceilings"]["TFLOP/s float32"]
    assert own["roofline"] == pytest.approx(max(limits) / own["ms"], rel=2e-3)
    (carried,) = json.loads((tmp_path / "pytest-benchmark.json").read_text())["benchmarks"]
    assert carried["extra_info"]["ways"] == row["ways"]
    assert 1e3 * carried["stats"]["median"] == pytest.approx(own["ms"], rel=1e-3)


@pytest.mark.parametrize("kind", ["growkern", "pytorch"])
def test_a_failing_check_gives_no_time(bench: Callable[[str], ModuleType], kind: str) -> None:
    race, clock = bench("race"), bench("clock")
    right, runs = torch.ones(3, dtype=torch.float64), []
    stored: list[dict[str, Any]] = []

    def way(name: str, kind: str, value: Tensor | None) -> Any:
        def run() -> Tensor:
            runs.append(name)
            if value is None:
                raise RuntimeError("out of order")
            return value

        return race.Way(name, kind, run, 1e-6)

    ways = [way("cpp", "growkern", right), way("naive", "users", right)]
    ways += [way("wrong", kind, 2 * right), way("nan", kind, math.nan * right), way("broken", kind, None)]
    measured = race.Race(Rounds(), clock.Clock("cpu"), CEILINGS, stored.append, 3, 0.1)
    check = partial(error, ref=right)
    if kind == "growkern":
        with pytest.raises(pytest.fail.Exception, match=r"wrong: error 1\.0e\+00 beyond 1\.0e-06; nan: .*order"):
            measured(dict(DESCRIBED), ways, check)
    else:
        measured(dict(DESCRIBED), ways, check)
    (row,) = stored
    entries = {entry["way"]: entry for entry in row["ways"]}
    assert [name for name, entry in entries.items() if "ms" in entry] == ["cpp", "naive"]
    assert list(entries["cpp"]["over"]) == ["naive"]
    assert runs.count("wrong") == runs.count("nan") == runs.count("broken") == 1
    # Taken in turns: the other way in the set-up of every round of growkern's.
    assert runs[-6:] == ["naive", "cpp"] * 3


def test_nothing_is_timed_beside_a_wrong_first_way(bench: Callable[[str], ModuleType]) -> None:
    race, clock = bench("race"), bench("clock")
    stored: list[dict[str, Any]] = []
    measured = race.Race(Rounds(), clock.Clock("cpu"), CEILINGS, stored.append, 3, 0.1)
    ways = [race.Way("cpp", "growkern", lambda: 1.0, 0.1), race.Way("naive", "users", lambda: 0.0, 0.1)]
    with pytest.raises(pytest.fail.Exception):
        measured(dict(DESCRIBED), ways, abs)
    assert not any("ms" in way for way in stored[0]["ways"])


def test_ways_after_the_one_that_lost_the_gpu_are_not_blamed(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    race, clock = bench("race"), bench("clock")
    stored: list[dict[str, Any]] = []
    timer = clock.Clock("cpu")
    measured = race.Race(Rounds(), timer, CEILINGS, stored.append, 3, 0.1)

    def breaks() -> float:
        monkeypatch.setattr(timer, "is_lost", lambda: True)
        raise RuntimeError("an illegal memory access was encountered")

    ways = [race.Way("fine", "growkern", lambda: 1.0, 2.0), race.Way("breaks", "growkern", breaks, 2.0)]
    ways.append(race.Way("naive", "users", lambda: 1.0, 2.0))
    with pytest.raises(pytest.fail.Exception, match="breaks: RuntimeError: an illegal"):
        measured(dict(DESCRIBED), ways, abs)
    assert [way.get("failed", "")[:12] for way in stored[0]["ways"]] == ["", "RuntimeError", ""]


def measured_row(case: str, ms: float, others: float, kind: str = "users") -> dict[str, Any]:
    times = {"low": 0.98 * ms, "high": 1.02 * ms, "ms": ms}
    ratio = [others / ms, 0.98 * others / ms, 1.02 * others / ms]
    own = {"way": "cpp", "kind": "growkern", "error": 1e-7, "MiB": 1.0, **times, "over": {"naive": ratio}}
    return {**DESCRIBED, "case": case, "ways": [own, {"way": "naive", "kind": kind, "ms": others, "MiB": 1.0}]}


def test_a_planted_regression_is_found(
    bench: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results, compare = bench("results"), bench("compare")
    old, new = tmp_path / "old", tmp_path / "new"
    for where, slower in ((old, 1.0), (new, 1.3)):
        run = {"at": where.name}
        results.store(where / "moments.json", run, measured_row("a", 1.0 * slower, 5.0))
        # All of the machine is twice as slow: no regression.
        twice = 2 if slower > 1 else 1
        results.store(where / "moments.json", run, measured_row("b", 1.0 * twice, 5 * twice))
        results.store(where / "moments.json", run, measured_row("c", 1.0 * twice, 5 * twice, "training"))
    for other, status in ((old, 0), (new, 1)):
        monkeypatch.setattr(sys, "argv", ["compare.py", str(old), str(other)])
        assert compare.main() == status
    said = capsys.readouterr().out
    assert said.count("SLOWER") == 1
    assert "SLOWER  sum  a" in said
    results.store(old / "moments.json", {"at": "later"}, measured_row("b", 1.0, 5.0))
    record = results.read(old / "moments.json")
    assert [(row["case"], row["run"]) for row in record["rows"]] == [("a", "old"), ("b", "later"), ("c", "old")]


def test_documents_quote_the_committed_results(bench: Callable[[str], ModuleType]) -> None:
    report = bench("report")
    for path in report.QUOTING:
        assert path.read_text() == report.quoted(path), "python bench/report.py --readme"


@pytest.mark.parametrize(
    "case",
    [
        case
        for op in ("conv2d_moments", "conv2d_residual")
        for case in cases(op)
        if case.name.rpartition("-")[0] in GEOMETRIES
    ]
    + [case for case in cases("linear_moments", "linear_residual") if case.name in ("1000 rows", "no bias")]
    + [case for case in cases("linear_residual") if case.name in ("runs", "a run that ends early")],
    ids=str,
)
def test_other_ways_give_what_the_op_gives(bench: Callable[[str], ModuleType], case: Case) -> None:
    args, named = case.arguments(torch.float64)
    with use_backend("reference"):
        expected = case.function(*args, **named)
    baselines = bench("baselines")
    for name, _, run in baselines.ways(case, args, named, lambda: expected):
        assert max(map(error, run(), expected)) < 1e-12, name


def test_every_way_has_its_own_operations(bench: Callable[[str], ModuleType]) -> None:
    """61 products of channels for 3×3 kernels at stride 1, as csrc/README.md counts, and little for borders."""
    work = bench("work")
    (case,) = (each for each in cases("conv2d_moments", size="bench") if each.name == "64ch 32² B=128-full")
    assert 61 < work.operations(case) / (2 * 64**2 * 128 * 32**2) * 1.05 < 66


def test_patience_brings_slow_ways_in(bench: Callable[[str], ModuleType], pytestconfig: pytest.Config) -> None:
    pytest.importorskip("gromo", reason="gromo is not installed: pip install gromo==0.1.0")
    for marker in ("rows", "later"):
        pytestconfig.addinivalue_line("markers", f"{marker}: of the suite")
    moments, solve, peer = bench("bench_moments"), bench("bench_solve"), bench("peer")
    (case,) = (each for each in cases("conv2d_moments") if each.name == "3×3-full")
    args, _ = case.arguments(torch.float32)
    for limit, brought_in in ((peer.operations(case) - 1, False), (math.inf, True)):
        ways: list[Any] = []
        left_out = moments.add_gromo(ways, case, args, limit, 1.0)
        assert ([way.name for way in ways], "gromo" in left_out) == (["gromo"] * brought_in, not brought_in)
    m = solve.site(37, 37, 4, 9, "cpu")
    few, left_out = solve.ways_of(m, full_svd=False)
    every, nothing = solve.ways_of(m, full_svd=True)
    assert {way.name for way in few} | left_out.keys() == {way.name for way in every}
    assert not nothing
    for way in every:
        assert error(way.run(), solve.best(m, solve.NEURONS)) < way.tolerance
