"""Reports: whole pages that need nothing from outside, and charts that are where the numbers say."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from growkern.training import Run, Settings, train
from growkern.training.charts import Axis, Chart, Series, axis, legend, short, svg
from growkern.training.pictures import write_pictures
from growkern.training.report import charts, growth_charts, page, read, write_report

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN: dict[str, Any] = {
    **{"width": 2, "neurons": "2", "where": "all", "schedule": "every:1", "measured": 64, "threads": 1, "epochs": 3}
}
VOID = {"meta", "br", "hr", "img", "path", "circle"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self.seen.append(f"<{tag}")
        if tag not in VOID:
            self.open.append(tag)

    def get_starttag_text_of_all(self) -> str:
        return " ".join(self.seen)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(Settings(**PLAN, seed=seed, name="grown <b>"), root / f"grown{seed}")
        train(Settings(**PLAN, seed=seed, method="none", name="tiny"), root / f"tiny{seed}")
    torch.set_num_threads(threads)
    return sorted(root.iterdir())


def test_the_page_of_one_run(folders: list[Path], tmp_path: Path) -> None:
    path = write_report(folders[:1], tmp_path / "deep" / "page.html")
    text = path.read_text()
    found = Page(text)
    assert not found.links
    assert not re.search(r"https?://|url\(|@import", text)
    words = " ".join(found.text)
    run = Run(folders[0])
    end = run.records("metrics.jsonl")[-1]
    for expected in (f"{end['accuracy']:.2f} %", f"→ {end['parameters']:,}", "Growth log", "weight_decay", "grown <b>"):
        assert expected in words
    parts = [part for step in run.records("growth.jsonl") for part in step["parts"]]
    assert text.count('class="yes"') == sum(part["accepted"] for part in parts) > 0
    assert text.count('class="no"') == sum(not part["accepted"] for part in parts)
    assert text.count("<svg") == 6
    assert "prefers-color-scheme: dark" in text


def test_the_page_of_several_runs(folders: list[Path]) -> None:
    text = page(read(folders))
    words = Page(text).text
    assert words.count("tiny") >= 2
    ends = [Run(folder).records("metrics.jsonl")[-1]["accuracy"] for folder in folders if "tiny" in folder.name]
    mean = sum(ends) / 2
    deviation = math.sqrt(sum((end - mean) ** 2 for end in ends))
    assert f"{mean:.2f} ± {deviation:.2f}" in words
    assert text.count("<details>") == 1  # the growth of the second run that grew


def test_runs_without_names_are_named_by_what_differs(tmp_path: Path) -> None:
    for width in (2, 3):
        train(Settings(**PLAN | {"width": width, "epochs": 1}), tmp_path / str(width))
    assert [story.label for story in read([tmp_path / "2", tmp_path / "3"])] == ["width 2", "width 3"]
    assert [story.label for story in read([tmp_path / "2"])] == ["2"]


def test_runs_that_differ_in_seed_alone_are_one_row(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(Settings(**PLAN | {"seed": seed, "epochs": 1}), tmp_path / str(seed))
    stories = read([tmp_path / "0", tmp_path / "1"])
    assert {story.label for story in stories} == {"mlp, tiny"}
    assert "±" in page(stories)


def test_odd_records_do_not_break_a_page(folders: list[Path], tmp_path: Path) -> None:
    """No accuracy, infinite losses, markup in versions."""
    copy = tmp_path / "odd"
    shutil.copytree(folders[0], copy)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for line, value in zip(lines, (math.inf, math.nan, 0.5), strict=True):
        del line["accuracy"]
        line["test_loss"] = value
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = (copy / "config.json").read_text().replace(torch.__version__, "<script>")
    (copy / "config.json").write_text(config.replace("grown <b>", "cost $\\\\foo$"))
    for chosen in ([copy], [folders[0], copy], [copy, folders[0]]):
        text = page(read(chosen))
        assert "<script" not in Page(text).get_starttag_text_of_all()
        assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", text))
        write_pictures(chosen, tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"out: .* is a folder"):
        write_report([copy], tmp_path)


def test_charts_hold_what_the_run_recorded(folders: list[Path]) -> None:
    (story,) = read(folders[:1])
    metrics = story.run.records("metrics.jsonl")
    by_parameters, by_compute, by_time = charts([story])
    assert by_parameters.series[0].points == [(m["parameters"], m["accuracy"]) for m in metrics]
    assert by_compute.series[0].points == [(m["compute"], m["accuracy"]) for m in metrics]
    assert by_time.series[0].points == [(m["seconds"], m["accuracy"]) for m in metrics]
    widths, held, *_ = growth_charts(story)
    assert {s.label: s.points[-1][1] for s in widths.series} == metrics[-1]["widths"]
    first = story.run.records("growth.jsonl")[0]
    assert {s.label: s.points[0] for s in held.series} == {k: (1, v) for k, v in first["bottlenecks"].items()}


def test_pictures(folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = write_pictures(folders, tmp_path / "page.html")
    assert {path.name for path in written} >= {
        f"page-{name}.png" for name in ("parameters", "compute", "seconds", "widths")
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_a_run_that_has_no_epoch_yet(tmp_path: Path) -> None:
    Run.create(tmp_path / "new", Settings())
    with pytest.raises(ValueError, match="new has no complete epoch yet"):
        write_report([tmp_path / "new"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("values", "log"),
    [
        *(([3.0], False), ([0.0, 0.0], False), ([1.0, 5.0, 2.0], False), ([-3.0, 4.0], False), ([1e-7, 3e6], True)),
        *(([5.0, 5.0], True), ([100, 130], True), ([0.0, 10.0], True), ([1e9, 2e9], False), ([], True)),
    ],
)
def test_axes_hold_their_values_and_have_ticks(values: list[float], log: bool) -> None:
    chosen = axis(values, log)
    assert all(0 <= chosen.place(value) <= 1 for value in values)
    ticks = chosen.ticks()
    assert 2 <= len(ticks) <= 14
    assert ticks == sorted(set(ticks))
    assert all(-1e-6 <= chosen.place(tick) <= 1 + 1e-6 for tick in ticks)


def test_axis_places_are_linear_or_logarithmic() -> None:
    assert Axis(0.0, 10.0, False).place(2.5) == pytest.approx(0.25)
    assert Axis(1.0, 10000.0, True).place(10.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12, "12"),
        (0.25, "0.25"),
        (1234, "1.23k"),
        (3.5e6, "3.5M"),
        (2e9, "2G"),
        (2e-5, "2e-5"),
        (-0.01, "-0.01"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_svg_draws_points_where_they_belong() -> None:
    chart = Chart(
        "c", "A <title>", "x", "y", [Series("a", [(0, 0), (10, 10)], "red"), Series("b", [(5, 5)], "blue", "dots")]
    )
    text = svg(chart)
    Page(text)
    assert "A &lt;title&gt;" in text
    ends = [
        float(n) for n in re.search(r'class="line" stroke="red" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)', text).groups()
    ]  # type: ignore[union-attr]
    dot = [float(n) for n in re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4" fill="blue"', text).groups()]  # type: ignore[union-attr]
    assert dot[0] == pytest.approx((ends[0] + ends[2]) / 2, abs=0.1)
    assert dot[1] == pytest.approx((ends[1] + ends[3]) / 2, abs=0.1)
    assert ends[2] > ends[0]
    assert ends[3] < ends[1]
    assert legend(chart).count("<li>") == 2
