"""One self-contained HTML page about a run, or comparing several."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from growkern import storage
from growkern.training.charts import RUNS, Chart, Series, along, legend, short, svg
from growkern.training.run import Run
from growkern.training.settings import NEVER

# Settings in which runs may differ and still be repetitions of one another.
ALIKE = ("seed", "like", "name", "threads", "device", "data_root", "download", "tensorboard")


@dataclasses.dataclass(frozen=True)
class Story:
    """What a run left behind, under the name that it has in a report."""

    label: str
    run: Run
    epochs: list[dict[str, Any]]
    growth: list[dict[str, Any]]

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Growth events site by site, each with its epoch."""
        return [{**part, "epoch": step["epoch"]} for step in self.growth for part in step["parts"] or (step,)]


def score(stories: Sequence[Story]) -> tuple[str, str]:
    """Find key and name of the best measure that all runs have: accuracy, or a loss."""
    names = {"accuracy": "test accuracy, %", "test_loss": "test loss", "loss": "training loss"}
    return next((key, name) for key, name in names.items() if all(key in story.epochs[-1] for story in stories))


def read(folders: Sequence[Path]) -> list[Story]:
    """Read runs and find names for them.

    Parameters
    ----------
    folders : sequence of Path
        Run directories.

    Returns
    -------
    list of Story
        Named by their setting `name`, or else by the settings in which they differ.

    Raises
    ------
    ValueError
        If one is no run directory, or has no complete epoch yet.
    """
    runs = [Run(folder) for folder in folders]
    settings = [dataclasses.asdict(run.settings) for run in runs]
    differ = [key for key in settings[0] if key not in ALIKE and len({str(s[key]) for s in settings}) > 1]
    stories = []
    for run, values in zip(runs, settings, strict=True):
        shared = run.folder.resolve().name if len(runs) == 1 else f"{values['model']}, {values['method']}"
        label = values["name"] or ", ".join(f"{key} {values[key]}" for key in differ) or shared
        epochs = run.records("metrics.jsonl")
        if not epochs:
            raise ValueError(f"run: {run.folder} has no complete epoch yet")
        stories.append(Story(label, run, epochs, run.records("growth.jsonl")))
    return stories


def charts(stories: Sequence[Story]) -> list[Chart]:
    """Draw how all runs went: score against parameters, compute and time."""
    labels = list(dict.fromkeys(story.label for story in stories))
    key, name = score(stories)
    found = []
    for axis, against, label in (
        ("parameters", "parameters", "parameters"),
        ("compute", "compute", "multiply-adds per training sample, growth included"),
        ("seconds", "time", "seconds"),
    ):
        series = []
        for story in stories:
            rows = [row for row in story.epochs if math.isfinite(row.get(key, math.nan))]
            notes = [f"{story.label}, epoch {r['epoch']}: {r[key]:.4g}, {r['parameters']:,} parameters" for r in rows]
            points = [(r[axis], r[key]) for r in rows]
            series.append(Series(story.label, points, RUNS[labels.index(story.label) % len(RUNS)], notes=notes))
        sizes = [x for s in series for x, _ in s.points]
        found.append(
            Chart(
                axis,
                f"{name.split(',')[0].capitalize()} against {against}",
                label,
                name,
                series,
                max(sizes) > 8 * min(sizes),
            )
        )
    return found


def growth_charts(story: Story) -> list[Chart]:
    """Draw how one network grew: widths, bottlenecks, and what growth promised and gave."""
    sites = list(story.epochs[-1]["widths"])
    colours = {site: along(i, len(sites)) for i, site in enumerate(sites)}
    widths = [
        Series(site, [(r["epoch"], r["widths"][site]) for r in story.epochs], colours[site], "steps") for site in sites
    ]
    held = [
        Series(
            site,
            [(s["epoch"], s["bottlenecks"][site]) for s in story.growth if site in s["bottlenecks"]],
            colours[site],
            notes=[
                f"{site}, epoch {s['epoch']}: {s['bottlenecks'][site]:.3g}"
                for s in story.growth
                if site in s["bottlenecks"]
            ],
        )
        for site in sites
    ]
    kept = [
        p for p in story.parts if p["accepted"] and p["gain"] * p["scale"] > 0 and p["loss_before"] > p["loss_after"]
    ]
    paid = [
        Series(
            site,
            [(p["gain"] * p["scale"], p["loss_before"] - p["loss_after"]) for p in kept if p["site"] == site],
            colours[site],
            "dots",
            [
                f"{site}, epoch {p['epoch']}: +{p['neurons']} units at scale {p['scale']:g}"
                for p in kept
                if p["site"] == site
            ],
        )
        for site in sites
    ]
    found = [Chart("widths", "Units per site", "epoch", "units", widths)]
    if held := [series for series in held if series.points]:
        found.append(Chart("bottlenecks", "Bottleneck per site", "epoch", "Ψ = E‖v⊥‖²", held, y_log=True))
    if paid := [series for series in paid if series.points]:
        title = "Gain promised and obtained"
        found.append(
            Chart(
                "gain", title, "promised: gain × scale", "obtained: fall of the loss", paid, True, True, diagonal=True
            )
        )
    return found


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """Write the page.

    Parameters
    ----------
    folders : sequence of Path
        Run directories.
    path : Path
        HTML file to write.

    Returns
    -------
    Path
        The same path.

    Raises
    ------
    ValueError
        If one is no run directory, or has no complete epoch yet, or `path` is a folder.
    """
    stories = read(folders)
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder; expected a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace(path, page(stories).encode())
    return path


def page(stories: Sequence[Story]) -> str:
    """Compose the HTML page of some runs."""
    first, alone = stories[0], len(stories) == 1
    title = f"growkern: {first.run.folder.resolve().name}" if alone else f"growkern: {len(stories)} runs"
    grown = [story for story in stories if story.growth]
    body = [f"<h1>{escape(title)}</h1>", _subtitle(stories), _tiles(first) if alone else "", _summary(stories)]
    body += ["<h2>Progress</h2>", _cards(charts(stories))]
    for story in grown:
        name = "" if alone else f": {escape(story.label)}, seed {story.run.settings.seed}"
        opened = (f"<h2>Growth{name}</h2>", _cards(growth_charts(story)), _log(story))
        folded = (f"<details><summary>Growth{name}</summary>", *opened[1:], "</details>")
        body += opened if story is grown[0] else folded
    body += ["<h2>Settings</h2>", _settings(stories)]
    style = resources.files("growkern.training").joinpath("report.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _subtitle(stories: Sequence[Story]) -> str:
    s, versions = stories[0].run.settings, stories[0].run.versions
    what = s.target or f"{s.model} on {s.dataset}"
    return (
        f'<p class="soft">{escape(what)} · growkern {escape(versions["growkern"])} · '
        f"torch {escape(versions['torch'])}</p>"
    )


def _tiles(story: Story) -> str:
    begin, end = story.epochs[0], story.epochs[-1]
    key, name = score([story])
    value = f"{end[key]:.2f} %" if key == "accuracy" else f"{end[key]:.4g}"
    units = sum(p["neurons"] for p in story.parts)
    tiles = (
        (name.split(",")[0], value),
        ("parameters", f"{begin['parameters']:,} → {end['parameters']:,}"),
        ("units added", f"{units}" if story.run.settings.method != NEVER else "none: never grows"),
        ("multiply-adds per sample", short(end["compute"])),
        ("epochs", str(end["epoch"])),
        ("time", f"{end['seconds']:.1f} s"),
    )
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in tiles)
    return f'<div class="tiles">{cells}</div>'


def _summary(stories: Sequence[Story]) -> str:
    """Compose a table of means over seeds; nothing for one run."""
    if len(stories) == 1:
        return ""
    key, name = score(stories)
    rows = []
    for label in dict.fromkeys(story.label for story in stories):
        last = [story.epochs[-1] for story in stories if story.label == label]
        scores = [row[key] for row in last]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        mean = {k: statistics.mean(row[k] for row in last) for k in ("parameters", "compute", "epoch", "seconds")}
        rows.append(
            (
                *(label, len(last), f"{statistics.mean(scores):.2f}{spread}", f"{mean['parameters']:,.0f}"),
                *(short(mean["compute"]), f"{mean['epoch']:.0f}", f"{mean['seconds']:.1f}"),
            )
        )
    heads = ("network", "seeds", f"{name}, mean ± standard deviation", "parameters", "multiply-adds / sample", "epochs")
    return "<h2>Results</h2>" + _table((*heads, "seconds"), rows)


def _cards(found: Sequence[Chart]) -> str:
    cards = "".join(f'<section class="card"><h3>{escape(c.title)}</h3>{svg(c)}{legend(c)}</section>' for c in found)
    return f'<div class="cards">{cards}</div>'


def _log(story: Story) -> str:
    rows = []
    for p in story.parts:
        grew = (
            f'<span class="yes">+{p["neurons"]}</span>'
            if p["accepted"]
            else f'<span class="no">{escape(p["reason"])}</span>'
        )
        rows.append(
            (
                *(p["epoch"], Cell(escape(p["site"])), Cell(grew), p["widths"].get(p["site"], ""), short(p["scale"])),
                *(short(p["bottleneck"]), short(p["removed"]), short(p["gain"] * p["scale"])),
                *(short(p["loss_before"] - p["loss_after"]), f"{p['seconds']:.2f}"),
            )
        )
    heads = ("epoch", "site", "grew", "units", "scale", "bottleneck", "removed", "promised", "obtained", "seconds")
    return "<h2>Growth log</h2>" + _table(heads, rows)


def _settings(stories: Sequence[Story]) -> str:
    columns = [dataclasses.asdict(story.run.settings) for story in stories]
    rows = [(name, *(Cell(escape(str(c[name]))) for c in columns)) for name in columns[0]]
    return _table(("setting", *(Cell(escape(story.run.folder.name)) for story in stories)), rows)


class Cell(str):
    """Text that is HTML already and is aligned to the left."""


def _table(heads: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    def cell(tag: str, value: Any) -> str:
        return (
            f'<{tag} class="text">{value}</{tag}>'
            if isinstance(value, Cell)
            else f"<{tag}>{escape(str(value))}</{tag}>"
        )

    head = "".join(cell("th", Cell(h) if h in ("site", "grew") else h) for h in heads)
    body = "".join("<tr>" + "".join(cell("td", value) for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
