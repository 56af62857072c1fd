"""Charts as data, and as SVG that follows the page's width and its light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 44
RUNS = ("#2a7de1", "#e0602b", "#14966b", "#b0569b", "#a08215", "#5a6fd0", "#c2415a", "#4f8f9f")


@dataclass(frozen=True)
class Series:
    """One line, or one set of dots.

    Attributes
    ----------
    label : str
        In the legend; series of one label share its entry.
    points : sequence of (float, float)
        In data units, in order.
    colour : str
        CSS colour, legible on light and dark.
    kind : str
        "line", "steps" or "dots".
    notes : sequence of str
        What to show when the pointer rests on a point.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    kind: str = "line"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A chart with its axes."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    diagonal: bool = False


@dataclass(frozen=True)
class Axis:
    """From data to the unit interval, with ticks."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """Position of a value between 0 and 1."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within the axis, about five."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
                stride = max(1, (last - first) // 5)
                found = [s * 10.0**e for e in range(first, last + 1, stride) for s in steps]
                found = [v for v in found if self.low <= v <= self.high]
                if len(found) >= 3:
                    return found
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * s for s in (1, 2, 5, 10) if unit * s >= rough)
        first_step = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first_step, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Sequence[float], log: bool) -> Axis:
    """Choose an axis that holds some values, with a little room; logarithmic only where all are positive."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    log = log and low > 0
    if log:
        room = max((high / low) ** 0.05, 1.1)
        return Axis(low / room, high * room, True)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(max(low - room, 0.0) if low >= 0 else low - room, high + room, False)


def short(value: float) -> str:
    """Write a number in a few characters: 12k, 3.5M, 0.02."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def axes(chart: Chart) -> tuple[Axis, Axis]:
    """Choose both axes of a chart; with a diagonal they are one."""
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    if chart.diagonal:
        both = axis(xs + ys, chart.x_log)
        return both, both
    return axis(xs, chart.x_log), axis(ys, chart.y_log)


def svg(chart: Chart) -> str:
    """Draw a chart.

    Parameters
    ----------
    chart : Chart
        What to draw.

    Returns
    -------
    str
        An SVG element without fixed size; colours of text and grid come from the page's style sheet.
    """
    x_axis, y_axis = axes(chart)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x_axis.place(x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y_axis.place(y) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">']
    for value in x_axis.ticks():
        x, _ = at(value, y_axis.low)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>'
        )
    for value in y_axis.ticks():
        _, y = at(x_axis.low, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    turn = f"rotate(-90 11 {(HEIGHT - BOTTOM + TOP) / 2})"
    parts.append(
        f'<text class="label" x="11" y="{(HEIGHT - BOTTOM + TOP) / 2}" transform="{turn}" text-anchor="middle">'
        f"{escape(chart.y_label)}</text>"
    )
    if chart.diagonal:
        (x, y), (x_end, y_end) = at(x_axis.low, x_axis.low), at(x_axis.high, x_axis.high)
        parts.append(f'<path class="diagonal" d="M{x:.1f} {y:.1f}L{x_end:.1f} {y_end:.1f}"/>')
    for series in chart.series:
        places = [at(*point) for point in series.points]
        if series.kind == "steps":  # sites of equal width would hide each other
            aside = 2.5 * (list(chart.series).index(series) - (len(chart.series) - 1) / 2)
            places = [(x, y + aside) for x, y in places]
        parts += _drawn(series, places)
    return "".join(parts) + "</svg>"


def _drawn(series: Series, places: Sequence[tuple[float, float]]) -> list[str]:
    parts = []
    if series.kind != "dots" and len(places) > 1:
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
        for x, y in places[1:]:
            path += f"H{x:.1f}V{y:.1f}" if series.kind == "steps" else f"L{x:.1f} {y:.1f}"
        parts.append(f'<path class="line" stroke="{series.colour}" d="{path}"/>')
    dots = range(len(places)) if series.kind == "dots" or len(places) == 1 else [len(places) - 1]
    parts += [f'<circle cx="{places[i][0]:.1f}" cy="{places[i][1]:.1f}" r="4" fill="{series.colour}"/>' for i in dots]
    for (x, y), note in zip(places, series.notes, strict=False):  # an unseen, larger target for the pointer
        parts.append(f'<circle class="target" cx="{x:.1f}" cy="{y:.1f}" r="7"><title>{escape(note)}</title></circle>')
    return parts


def legend(chart: Chart) -> str:
    """Write the legend of a chart as HTML; nothing where one entry would say no more than the title."""
    colours = {series.label: series.colour for series in chart.series}
    if len(colours) < 2:
        return ""
    items = "".join(f'<li><i style="background:{c}"></i>{escape(label)}</li>' for label, c in colours.items())
    return f'<ul class="legend">{items}</ul>'


def along(index: int, count: int) -> str:
    """Colour of one of several layers, from the input (violet) to the output (orange)."""
    hue = 265 - 240 * (index / (count - 1) if count > 1 else 0.0)
    return f"hsl({hue:.0f} 62% 56%)"
