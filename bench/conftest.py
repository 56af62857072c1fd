"""The suite's options and fixtures, and which rows run: the main ones first, then the others while there is time."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import results
import torch
from clock import Clock, measured
from machine import folder, run_record
from race import Race

# Seconds for the times of one row, of which a later one gets a part, and most rounds of it; a GPU is quick.
BUDGET, LATER, ROUNDS = {"cpu": 6.0, "cuda": 0.6}, 0.25, {"cpu": 15, "cuda": 25}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("growkern")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    group.addoption("--size", default="bench", help="rows: bench, or test to try the suite, or large (steps)")
    group.addoption("--budget", type=float, help="seconds for the times of one row")
    group.addoption("--rounds", type=int, help="most rounds of a row")
    group.addoption("--seconds", type=float, default=float("inf"), help="start no row after this time")
    group.addoption("--resume", action="store_true", help="leave out the rows that the results hold")
    group.addoption("--patience", action="store_true", help="wait for others' ways that take minutes a call, once each")
    group.addoption("--results", type=Path, default=results.RESULTS, help="where a folder of this machine is written")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rows(generator): the parameters of a benchmark, by size and device")
    config.addinivalue_line("markers", "later(rank): a row that is measured after the main ones, lower ranks first")
    config.addinivalue_line("filterwarnings", "default")  # a warning must not cost a row
    config.stash[START] = time.monotonic()
    option = config.option
    found = {row.get("test") for row in results.rows_below(option.results)} if option.resume else set()
    config.stash[FOUND] = found


START = pytest.StashKey[float]()
FOUND = pytest.StashKey[set[str]]()  # names of the tests whose rows are there
LOST = 70  # exit status after which a new process can go on, with --resume


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("rows")
    if marker:
        made = marker.args[0](metafunc.config.option.size, metafunc.config.option.device)
        names = [name for name in metafunc.fixturenames if name in ("case", "draws", "dtype", "precision", "width")]
        metafunc.parametrize(names, list(made))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=rank)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measured, disable_gc=True))


def rank(item: pytest.Item) -> int:
    marker = item.get_closest_marker("later")
    return marker.args[0] if marker else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - item.config.stash[START] > item.config.option.seconds:
        pytest.skip("no time left")
    if item.name in item.config.stash[FOUND]:
        pytest.skip("its row is there")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.option.device


@pytest.fixture(scope="session")
def patience(request: pytest.FixtureRequest) -> bool:
    return request.config.option.patience


@pytest.fixture(scope="session")
def clock(device: str) -> Clock:
    return Clock(device)


@pytest.fixture(scope="session")
def run(device: str, clock: Clock) -> dict[str, Any]:
    """What this run's rows have in common, its ceilings among them."""
    return run_record(device, clock)


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest, device: str, clock: Clock, run: dict[str, Any]) -> Race:
    option = request.config.option
    part = request.path.stem.removeprefix("bench_")

    plugins = request.config.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")

    def store(row: dict[str, Any]) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(told(row))
        row = {**row, "test": request.node.name}
        results.store(option.results / folder(run["hardware"]) / f"{part}.json", run, row)

    rounds, budget = option.rounds or ROUNDS[device], option.budget or BUDGET[device]
    if rank(request.node):
        budget *= LATER
    return Race(benchmark, clock, run["ceilings"], store, rounds, budget)


def told(row: dict[str, Any]) -> str:
    """A line for a row: times of growkern's ways, or why there is none, and the ratios of the first."""
    ways = [way for way in row["ways"] if way.get("kind") == "growkern"]
    times = [
        f"{way['way']} " + (f"{way['ms']:g} ms" if "ms" in way else way.get("failed", "not timed")) for way in ways
    ]
    over = [f"{ratio[0]:.2f}× {name}" for name, ratio in ways[0].get("over", {}).items()]
    kind = " ".join(row[each] for each in ("dtype", "precision") if row[each] != "ieee")
    return f"{row['op']} {row['case']}, {kind}: {', '.join([*times, *over])}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _lost(clock: Clock) -> Iterator[None]:
    yield
    if clock.is_lost():
        pytest.exit("the GPU gave up on this process", LOST)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
