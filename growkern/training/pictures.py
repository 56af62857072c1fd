"""The charts of a report as PNG files."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkern.training.charts import Chart, axes, short
from growkern.training.report import charts, growth_charts, read


def write_pictures(folders: Sequence[Path], beside: Path) -> list[Path]:
    """Write one PNG for each chart of a report.

    Parameters
    ----------
    folders : sequence of Path
        Run directories.
    beside : Path
        The report; pictures take its name and the chart's.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ValueError
        If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("png: needs matplotlib: pip install growkern[report]") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names are text
    from matplotlib import pyplot

    stories, written = read(folders), []
    grown = next((story for story in stories if story.growth), None)
    for chart in charts(stories) + (growth_charts(grown) if grown else []):
        figure, axis = pyplot.subplots(figsize=(5.6, 4.0), layout="constrained")
        draw(chart, axis)
        written.append(beside.with_name(f"{beside.stem}-{chart.name}.png"))
        figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written


def draw(chart: Chart, axis: Any) -> None:
    """Draw a chart on a matplotlib axis."""
    seen = set()
    for series in chart.series:
        if not series.points:
            continue
        style: dict[str, Any] = {"color": _rgb(series.colour), "label": None if series.label in seen else series.label}
        seen.add(series.label)
        xs, ys = zip(*series.points, strict=True)
        if series.kind == "dots":
            axis.plot(xs, ys, "o", **style)
        else:
            axis.plot(xs, ys, drawstyle="steps-post" if series.kind == "steps" else "default", **style)
            axis.plot(xs[-1], ys[-1], "o", color=style["color"])
    for each, place in zip(axes(chart), (axis.xaxis, axis.yaxis), strict=True):
        name = place.axis_name
        axis.set(**{f"{name}scale": "log" if each.log else "linear", f"{name}lim": (each.low, each.high)})
        ticks = each.ticks()
        place.set_ticks(ticks, [short(value) for value in ticks])
        place.set_ticks([], minor=True)
    if chart.diagonal:
        axis.axline((axis.get_xlim()[0],) * 2, (axis.get_xlim()[1],) * 2, color="gray", linestyle="--", linewidth=1)
    axis.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(seen) > 1:
        axis.legend(frameon=False, fontsize=9)


def _rgb(colour: str) -> Any:
    """Matplotlib's form of a CSS colour."""
    if match := re.match(r"hsl\((\d+) (\d+)% (\d+)%\)", colour):
        hue, saturation, lightness = (int(text) for text in match.groups())
        return colorsys.hls_to_rgb(hue / 360, lightness / 100, saturation / 100)
    return colour
