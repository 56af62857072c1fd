"""Tables and plots of what the suite measured, and the figures that documents quote.

python bench/report.py [FOLDER ...] writes report.md and scaling.png into each folder of results (all machines' if none
is named). python bench/report.py --readme writes the tables between the markers of the documents that quote them.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).parents[1]
QUOTING = (ROOT / "README.md", ROOT / "csrc" / "README.md", ROOT / "docs" / "gromo.md")
GROWTH = ("digits", "fashion-mnist")
# What the README shows, in this order: parts of "op case dtype".
SHOWN = (
    *(f"conv2d_moments {case}-full float32" for case in ("8ch 32² B=256", "16ch 32² B=256", "64ch 32² B=128")),
    *(f"conv2d_moments {case}-full float32" for case in ("128ch 16² B=128", "256ch 8² B=128", "512ch 4² B=128")),
    "conv2d_moments 64ch 32² B=128-center float32",
    "linear_moments width 64 float32",
    "linear_moments FFN 768 float32",
    "conv2d_residual 64ch 32² B=128-full float32",
    "grouped_moments 20 linear sites",
    "eigh 1000×16² float32",
    "eigh 128×33² float32",
    "svd 128×64×33 float32",
    "solve p = 577",
    "solve p = 1153",
    "solve p = 2305",
    "solve 100 sites",
)
MARKS = re.compile(r"(<!-- from bench/results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def best(row: Row, own: Row, *kinds: str) -> tuple[str, list[float]] | None:
    """The fastest way of these kinds, and growkern's ratios to it."""
    names = {way["way"]: way for way in row["ways"] if way.get("kind") in kinds and "ms" in way}
    if not names:
        return None
    name = min(names, key=lambda each: names[each]["ms"])
    return name, own["over"][name]


def own_ways(row: Row) -> list[Row]:
    return [way for way in row["ways"] if way.get("kind") == "growkern"]


def digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    written = [f"| {' | '.join(line)} |\n" for line in (head, *lines)]
    return "".join([written[0], f"|{'---|' * len(head)}\n", *written[1:]])


def spread(found: tuple[str, list[float]] | None, named: bool = False) -> str:
    if found is None:
        return "–"
    name, (median, low, high) = found
    text = f"{digits(median)} ({digits(low)}–{digits(high)})"
    return f"{text} {name}" if named else text


def full_table(rows: list[Row]) -> str:
    """Every row and backend: time, ratios with their quartiles, rates, memory, error."""
    head = "case | backend | ms | over users' PyTorch | over the best of PyTorch | over gromo | GB/s | TFLOP/s"
    head += " | of the roofline | MiB | error"
    lines = []
    for row in rows:
        name = f"{row['case']}, {row['dtype']}" + (f", {row['precision']}" if row["precision"] != "ieee" else "")
        for way in own_ways(row):
            if "failed" in way:
                lines.append([name, way["way"], way["failed"], *[""] * 8])
                continue
            ratios = [spread(best(row, way, *kinds), named=kinds[-1] != "gromo") for kinds in KINDS]
            rates = [digits(way[each]) if each in way else "–" for each in ("GB/s", "TFLOP/s", "roofline", "MiB")]
            time = f"{digits(way['ms'])} ({digits(way['low'])}–{digits(way['high'])})"
            lines.append([name, way["way"], time, *ratios, *rates, f"{way['error']:.1e}"])
    return table(head.split(" | "), lines)


KINDS = (("users",), ("users", "pytorch"), ("gromo",))


def others_table(rows: list[Row]) -> str:
    """Every other way, so that the best of PyTorch is seen to be the best."""
    lines = []
    for row in rows:
        for way in row["ways"]:
            if way.get("kind") != "growkern":
                told = way.get("failed") or way.get("left out")
                time = told or f"{digits(way['ms'])} ({digits(way['low'])}–{digits(way['high'])})"
                memory = "" if told else digits(way["MiB"])
                lines.append([row["case"], row["dtype"], row["precision"], way["way"], time, memory])
    return table(["case", "dtype", "precision", "way", "ms", "MiB"], lines)


def of_run(run: Row) -> str:
    """Where and with what a run was."""
    machine = ", ".join(f"{value}" if name == "name" else f"{name} {value}" for name, value in run["hardware"].items())
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    most = ", ".join(f"{name} {value:g}" for name, value in run["ceilings"].items())
    return (
        f"- {run['at']} UTC, commit {run['commit'] or 'unknown'}, load average {run['load average']} at the start\n"
        f"  - {machine}\n  - {packages}\n  - ceilings: {most}\n"
    )


def report(folder: Path) -> str:
    """A page for one machine."""
    runs: dict[str, Row] = {}
    by_op: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = results.read(path)
        runs |= record["runs"]
        for row in record["rows"]:
            by_op[row["op"]].append(row)
    text = [f"# {folder.name}\n", "".join(of_run(runs[at]) for at in sorted(runs))]
    text.append(
        "Times are medians with quartiles, ratios medians with quartiles of the ratios of each round: ways are timed\n"
        "in turns. Operations are counted as in bench/work.py; the roofline is that of the ceilings above, which are\n"
        "what torch.mm and a copy reach, so that a kernel can pass it. MiB is the most beyond what was held before.\n"
    )
    for op, rows in by_op.items():
        text += [f"## {op}\n", full_table(rows), "Other ways:\n", others_table(rows)]
        if op in SUMMARIES:
            head, lines = SUMMARIES[op]
            told = [cells for _, cells in lines({row["case"]: row for row in rows if timed(row)})]
            text += ["In short:\n", table(head, told)]
    return "\n".join(text)


def plot(folder: Path) -> None:
    """Cost along each axis of the scaling rows."""
    path = folder / "scaling.json"
    if not path.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes: dict[str, list[tuple[float, Row]]] = defaultdict(list)
    for row in results.rows(path):
        name, _, value = row["case"].partition(" = ")
        axes[name].append((float(value), row))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(4 * len(axes), 3.4), sharey=True, squeeze=False)
    for panel, (name, points) in zip(panels[0], axes.items(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for value, row in sorted(points, key=lambda point: point[0]):
            for way in row["ways"]:
                if "ms" in way:
                    own = way["kind"] == "growkern"
                    lines["growkern: " * own + way["way"]].append((value, way["ms"]))
        for label, line in lines.items():
            style = {"linewidth": 2.2} if label.startswith("growkern") else {"linestyle": "--", "linewidth": 1}
            panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=label, **style)
        panel.set(xscale="log", yscale="log", xlabel=name)
        panel.set_xticks([value for value, _ in points], [f"{value:g}" for value, _ in points])
        panel.minorticks_off()
        panel.legend(fontsize=6)
    panels[0][0].set_ylabel("ms")
    figure.tight_layout()
    figure.savefig(folder / "scaling.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


# What documents quote ---------------------------------------------------------------------------------------


def machine_tables(
    head: list[str], lines: Callable[[dict[str, Row]], list[tuple[Row, list[str]]]], command: str = "make bench"
) -> str:
    """A table for every machine on which the suite ran, under its name and the conditions of the last of its rows."""
    text = []
    for folder in results.machines():
        rows = {f"{row['op']} {row['case']} {row['dtype']}": row for row in results.rows(folder)}
        rows = {name: row for name, row in rows.items() if row["precision"] == "ieee" and timed(row)}
        found = lines(rows)
        if not found:
            continue
        runs = {at: run for path in folder.glob("*.json") for at, run in results.read(path)["runs"].items()}
        run = runs[max(row["run"] for row, _ in found)]
        threads = {None: "", 1: ", time of the processor on one thread"}
        number = run["hardware"].get("threads")
        machine = run["hardware"]["name"] + threads.get(number, f", {number} threads")
        told = f"{machine}, torch {run['versions']['torch']}, {run['at'][:10]}, load average {run['load average']}"
        told += f" at the start\n([all rows]({{prefix}}bench/results/{folder.name}))"
        text.append(f"{told}:\n\n{table(head, [cells for _, cells in found])}")
    return "\n".join(text) or f"No results yet: `{command}`.\n"


def timed(row: Row) -> bool:
    return "ms" in (own_ways(row) or [{}])[0]


def performance() -> str:
    def lines(rows: dict[str, Row]) -> list[tuple[Row, list[str]]]:
        found = []
        for text in SHOWN:
            for name, row in rows.items():
                if name.startswith(text):
                    own = own_ways(row)[0]
                    ratios = [spread(best(row, own, *kinds), named=len(kinds) > 1) for kinds in KINDS]
                    found.append((row, [f"`{row['op']}` {row['case']}", digits(own["ms"]), *ratios]))
        return found

    return machine_tables(["", "ms", "users' PyTorch ×", "best of PyTorch ×", "gromo ×"], lines)


def convolutions() -> str:
    def lines(rows: dict[str, Row]) -> list[tuple[Row, list[str]]]:
        found = []
        for name, row in rows.items():
            if name.startswith("conv2d_moments") and name.endswith("-full float32") and "TFLOP/s" in own_ways(row)[0]:
                own = own_ways(row)[0]
                ratios = [spread(best(row, own, *kinds), named=len(kinds) > 1) for kinds in KINDS[:2]]
                rates = [digits(1000 * own["TFLOP/s"]), digits(own["roofline"])]
                found.append((row, [row["case"].removesuffix("-full"), *ratios, *rates]))
        return [line for line in found if " = " not in line[1][0]]

    return machine_tables(["", "over users' PyTorch", "over the best of PyTorch", "GFLOP/s", "of the roofline"], lines)


STEPPERS = ("growkern", "PyTorch", "gromo")
STEPS = ["growth step", "s", "PyTorch by hand ×", "gromo ×", "MiB", "PyTorch by hand MiB", "gromo MiB"]


def steps(rows: dict[str, Row]) -> list[tuple[Row, list[str]]]:
    """Whole growth steps: time, ratios and memory beyond what was held."""
    found = []
    for row in rows.values():
        if row["op"] == "growth_step":
            ways = {way["way"]: way for way in row["ways"]}
            own = ways["growkern"]
            ratios = [spread(best(row, own, kind)) for kind in ("pytorch", "gromo")]
            memory = [digits(ways[way]["MiB"]) if "MiB" in ways.get(way, {}) else "–" for way in STEPPERS]
            found.append((row, [row["case"], digits(own["ms"] / 1e3), *ratios, *memory]))
    return found


EPOCHS = ["growth step on 2% of 50,000 images", "s", "an epoch of training, s", "growth step over epoch"]


def epochs(rows: dict[str, Row]) -> list[tuple[Row, list[str]]]:
    """What a growth step costs beside an epoch, whose time is that of a few batches times `epoch`."""
    found = []
    for row in rows.values():
        if row["op"] == "growth_beside_an_epoch":
            own, training = row["ways"]
            times = [digits(own["ms"] / 1e3), digits(training["ms"] * row["epoch"] / 1e3)]
            shares = [100 / (each * row["epoch"]) for each in own["over"]["training"]]
            share = f"{digits(shares[0])}% ({digits(shares[2])}–{digits(shares[1])}%)"
            found.append((row, [row["case"], *times, share]))
    return found


DROP_IN = ["growth step of", "gromo, s", "accelerated, s", "ratio", "statistics and updates alone", "MiB"]


def drop_in(rows: dict[str, Row]) -> list[tuple[Row, list[str]]]:
    """gromo as it is and accelerated; what the passes take is subtracted for the last ratio."""
    found = []
    for row in rows.values():
        ways = {way["way"]: way for way in row["ways"] if "ms" in way}
        if row["op"] == "growth_step" and {"gromo", "gromo, accelerated"} <= ways.keys():
            gromo, own, passes = (ways[name] for name in ("gromo", "gromo, accelerated", "gromo's passes"))
            alone = (gromo["ms"] - passes["ms"]) / (own["ms"] - passes["ms"])
            cells = [digits(gromo["ms"] / 1e3), digits(own["ms"] / 1e3), spread(best(row, own, "gromo"))]
            memory = f"{digits(gromo['MiB'])} / {digits(own['MiB'])}"
            found.append((row, [row["case"], *cells, digits(alone), memory]))
    return found


EXAMPLES = ["example", "gromo, ms", "accelerated, ms", "ratio", "the whole script, s", "last loss"]


def examples(rows: dict[str, Row]) -> list[tuple[Row, list[str]]]:
    """Statistics and updates of gromo's own example scripts, as they are and accelerated."""
    found = []
    for row in rows.values():
        if row["op"] == "gromo_example":
            own, gromo = row["ways"]
            parts = [f"{digits(way['statistics, ms'])} + {digits(way['updates, ms'])}" for way in (gromo, own)]
            ends = [f"{gromo[key] * scale:.4g} / {own[key] * scale:.4g}" for key, scale in ENDS]
            found.append((row, [f"`{row['case']}`", *parts, spread(best(row, own, "gromo")), *ends]))
    return found


ENDS = (("all, ms", 1e-3), ("loss", 1))
# Tables that follow the rows of an op.
SUMMARIES = {
    "growth_step": (STEPS, steps),
    "growth_beside_an_epoch": (EPOCHS, epochs),
    "gromo_example": (EXAMPLES, examples),
}


def growth() -> str:
    lines, differences = [], []
    for dataset in GROWTH:
        summary = json.loads((results.RESULTS / "growth" / f"{dataset}.json").read_text())["summary"]
        for line in summary:
            score = f"{line['accuracy']:.2f} ± {line['spread']:.2f}"
            size, epochs = f"{line['parameters']:,.0f}", f"{line['epochs']:.0f}"
            lines.append([dataset, line["model"], line["kind"], line["widths"], size, score, epochs])
        grown = [line for line in summary if "interval_95" in line]
        intervals = [", ".join(map(signed, line["interval_95"])) for line in grown]
        told = [f"{signed(g['minus_fixed'])} [{i}] ({g['model']})" for g, i in zip(grown, intervals, strict=True)]
        differences.append(f"- {dataset}: {', '.join(told)}\n")
    head = "data | model | network | widths | parameters | test accuracy, % | epochs".split(" | ")
    told = "Grown minus fixed in points, with the 95% interval of the paired difference:"
    return f"{table(head, lines)}\n{told}\n\n{''.join(differences)}"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


SECTIONS: dict[str, Callable[[], str]] = {
    "performance": performance,
    "convolutions": convolutions,
    "steps": lambda: machine_tables(STEPS, steps),
    "epochs": lambda: machine_tables(EPOCHS, epochs),
    "drop_in": lambda: machine_tables(DROP_IN, drop_in),
    "examples": lambda: machine_tables(EXAMPLES, examples, "python bench/gromo_examples.py FOLDER"),
    "growth": growth,
}


def quoted(path: Path) -> str:
    """The document with its sections as the committed results have them."""
    prefix = "../" * (len(path.relative_to(ROOT).parts) - 1)

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}\n{SECTIONS[match[2]]().replace('{prefix}', prefix)}\n{match[3]}"

    return MARKS.sub(section, path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--readme", action="store_true")
    chosen = parser.parse_args()
    if chosen.readme:
        for path in QUOTING:
            path.write_text(quoted(path))
        return
    for folder in chosen.folders or results.machines():
        (folder / "report.md").write_text(report(folder))
        plot(folder)
        print(folder / "report.md")


if __name__ == "__main__":
    main()
