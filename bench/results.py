"""Rows of the suite on disk: one file of a machine for each part, which keeps what a partial run does not measure."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KEY = ("op", "case", "dtype", "precision", "device")

Row = dict[str, Any]


def identity(row: Row) -> tuple[str, ...]:
    return tuple(row[field] for field in KEY)


def store(path: Path, run: dict[str, Any], row: Row) -> None:
    """Put a row in the place of an older one; `run` says when, where and with what it was measured."""
    record = read(path) if path.exists() else {"runs": {}, "rows": []}
    rows = [each for each in record["rows"] if identity(each) != identity(row)]
    place = next((i for i, each in enumerate(record["rows"]) if identity(each) == identity(row)), len(rows))
    rows.insert(place, {**row, "run": run["at"]})
    runs = {**record["runs"], run["at"]: run}
    used = {each["run"] for each in rows}
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in rows)
    head = json.dumps({at: each for at, each in runs.items() if at in used}, ensure_ascii=False, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"runs": {head},\n"rows": [\n{lines}\n]}}\n')


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows(where: Path) -> Iterator[Row]:
    """All rows of a file or a folder of them."""
    for path in sorted(where.glob("*.json")) if where.is_dir() else [where]:
        yield from read(path)["rows"]


def rows_below(where: Path) -> Iterator[Row]:
    """All rows of all machines in a folder."""
    for path in sorted(where.glob("*/*.json")):
        yield from read(path).get("rows", [])


def machines() -> list[Path]:
    """Folders of machines on which the suite ran."""
    files = (path for path in sorted(RESULTS.glob("*/*.json")) if "runs" in read(path))
    return list(dict.fromkeys(path.parent for path in files))
