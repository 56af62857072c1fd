"""One row of the suite: ways to do the same work, each held against float64, then timed in turns."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from clock import Clock

from growkern.backend import DEVICES, available, use_backend

Row = dict[str, Any]

# Largest error of others' ways, which must do the work: one chain of float32 additions over 262,144 positions was 7e-5
# off in torch.mm, and bfloat16 results are rounded.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
TF32 = 2e-3
LEAD, FIRST = 0.02, 10.0  # seconds that a GPU waits at most, and that a first call of others may take on one


@dataclass(frozen=True)
class Way:
    """A way to do the work; `kind` is "growkern", "users" (of PyTorch), "pytorch" (faster ones) or "gromo"."""

    name: str
    kind: str
    run: Callable[[], Any]
    tolerance: float


def own_ways(op: str, call: Callable[[], Any], device: str, tolerance: float) -> list[Way]:
    """The backends of an op, the one that "auto" takes first; beside others the reference is one of PyTorch's ways."""

    def run(backend: str) -> Any:
        with use_backend(backend):
            return call()

    names = [each for each in available(op) if each != "reference" and device in DEVICES.get(each, (device,))]
    names = names or ["reference"]  # the pure package
    return [Way(name, "growkern", lambda name=name: run(name), tolerance) for name in names]


@contextmanager
def at_precision(device: str, name: str) -> Iterator[None]:
    """Products and convolutions of PyTorch at the precision of the row, with the fastest algorithms of cuDNN."""
    torch.backends.cudnn.benchmark = True
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn.conv] if device == "cuda" else []
    before = [each.fp32_precision for each in settings]
    for each in settings:
        each.fp32_precision = name
    try:
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.fp32_precision = value


class Race:
    """Checks and times the ways of one row, and stores it.

    pytest-benchmark carries the row: its statistics are of growkern's first way, its `extra_info` holds the others,
    which are timed in the set-up of each of its rounds. So every ratio is of times taken in turns.
    """

    def __init__(
        self,
        benchmark: Any,
        clock: Clock,
        ceilings: dict[str, float],
        store: Callable[[Row], None],
        rounds: int,
        budget: float,
    ) -> None:
        self.benchmark, self.clock, self.ceilings, self.store = benchmark, clock, ceilings, store
        self.rounds, self.budget = rounds, budget

    def __call__(
        self,
        row: Row,
        ways: list[Way],
        error: Callable[[Any], float],
        *,
        operations: float = 0.0,
        nbytes: int = 0,
        ceiling: str = "",
        left_out: dict[str, str] | None = None,
        ahead: bool = False,
    ) -> None:
        """Time what passes the check; fail if a way of growkern does not pass it.

        `ahead` leaves out what launches cost on a GPU, which waits until the host is ahead of it.
        """
        entries: dict[str, Row] = {way.name: {"way": way.name, "kind": way.kind} for way in ways}
        estimates: dict[str, float] = {}
        for way in ways:
            estimates[way.name] = self.check(way, error, entries[way.name])
            if self.clock.is_lost():
                self.store(row | {"ways": list(entries.values())})
                pytest.fail(f"{way.name}: {entries[way.name].get('failed')}", pytrace=False)
        fit = [way for way in ways if "failed" not in entries[way.name]]
        leads = {way.name: min(1.5e-3 * entries[way.name].get("host ms", 0.0), LEAD) * ahead for way in fit}
        taken = self.in_turns(fit, estimates, leads) if fit and fit[0].kind == "growkern" else {}
        for way in fit[: len(taken)]:
            self.figures(entries[way.name], taken[way.name], operations, nbytes, ceiling)
            if way.kind == "growkern":
                entries[way.name]["over"] = {
                    other.name: ratio(taken[other.name], taken[way.name]) for other in fit if other.kind != "growkern"
                }
        if nbytes:
            row |= {"GFLOP": significant(operations / 1e9), "MB": significant(nbytes / 1e6)}
        row["ways"] = [*entries.values(), *({"way": name, "left out": why} for name, why in (left_out or {}).items())]
        self.benchmark.extra_info.update(row)
        self.store(row)
        wrong = [f"{e['way']}: {e['failed']}" for e in entries.values() if "failed" in e and e["kind"] == "growkern"]
        if wrong:
            pytest.fail("; ".join(wrong), pytrace=False)

    def check(self, way: Way, error: Callable[[Any], float], entry: Row) -> float:
        """Note error and memory of a way, or why it failed; how long it takes about."""
        try:
            start = self.clock.now()
            out, peak = self.clock.memory(way.run)
            took = self.clock.now() - start
            entry["error"] = found = float(error(out))
            if not found <= way.tolerance:
                entry["failed"] = f"error {found:.1e} beyond {way.tolerance:.1e}"
            elif took < self.budget / 4 or (self.clock.cuda and (way.kind == "growkern" or took < FIRST)):
                # The first call may have compiled, made tables, or let cuDNN try its algorithms.
                out = None
                out, peak = self.clock.memory(way.run)
                if self.clock.cuda:
                    entry["host ms"] = significant(self.clock.host(way.run) * 1e3)
                took = self.clock.seconds(way.run)
        except Exception as failure:  # one way must not cost the figures of the others
            entry["failed"] = f"{type(failure).__name__}: {failure}"[:200]
            return 0.0
        entry["MiB"] = round(peak / 2**20, 2)
        return took

    def in_turns(self, ways: list[Way], estimates: dict[str, float], leads: dict[str, float]) -> dict[str, list[float]]:
        """Times of each way by round. Each has the same share of the time: slow ones are in the first rounds only.

        A way that takes longer than the whole row may is not run again after its check.
        """
        share = self.budget / len(ways)
        rounds = {}
        taken: dict[str, list[float]] = {way.name: [] for way in ways}
        subject, *others = ways
        for way in ways:
            took = max(estimates[way.name], 1e-6)
            least = 3 if took < self.budget / 2 else 1
            rounds[way.name] = max(min(least, self.rounds), min(self.rounds, int(share / took)))
            if took > self.budget and way is not subject:
                taken[way.name].append(took)

        def turn() -> None:
            for way in others:
                if len(taken[way.name]) < rounds[way.name]:
                    taken[way.name].append(self.clock.seconds(way.run, leads[way.name]))

        def run() -> None:
            taken[subject.name].append(self.clock.seconds(subject.run, leads[subject.name]))

        self.benchmark.pedantic(run, setup=turn, rounds=rounds[subject.name])
        return taken

    def figures(self, entry: Row, taken: list[float], operations: float, nbytes: int, ceiling: str) -> None:
        median, low, high = quartiles(taken)
        entry |= {"ms": significant(median * 1e3), "low": significant(low * 1e3), "high": significant(high * 1e3)}
        entry["rounds"] = len(taken)
        if entry["kind"] == "growkern" and nbytes:
            most = [nbytes / self.ceilings["GB/s"] / 1e9]
            entry["GB/s"] = significant(nbytes / median / 1e9)
            if operations:
                entry["TFLOP/s"] = significant(operations / median / 1e12)
                most.append(operations / self.ceilings[ceiling] / 1e12)
            entry["roofline"] = significant(max(most) / median)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile; the range where there are fewer than four."""
    ordered = sorted(values)
    low, high = (statistics.quantiles(ordered, n=4)[::2]) if len(ordered) > 3 else (ordered[0], ordered[-1])
    return statistics.median(ordered), low, high


def ratio(others: list[float], own: list[float]) -> list[float]:
    """Median, lower and upper quartile of the ratios by round."""
    pairs = [one / two for one, two in zip(others, own, strict=False)]
    return [significant(each) for each in quartiles(pairs)]


def significant(value: float) -> float:
    """Four digits: times are no more exact."""
    return float(f"{value:.4g}")


def described(case: object, dtype: torch.dtype, precision: str, device: str) -> Row:
    op, _, name = str(case).partition("-")
    dtype_name = str(dtype).removeprefix("torch.")
    return {"op": op, "case": name, "dtype": dtype_name, "precision": precision, "device": device}
