"""python bench/compare.py OLD NEW [--tolerance 0.1] shows what changed between two results; exit status 1 if slower.

OLD and NEW are files or folders of bench/results. What counts is growkern's ratio to users' PyTorch (of whole growth
steps, to the one by hand; of their cost, to training), taken in turns in the same run, so that a machine that is slower
as a whole changes nothing; where no such way was timed, the time itself.
A row is slower if that got worse by more than the tolerance and the quartiles do not overlap; more memory, a check
that fails now and a way that is missing count as well.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results

RIVALS = ("users", "pytorch", "training")  # the first of them that a row has
LEAST_MIB = 1.0  # more memory than that is worth a word

Row = dict[str, Any]
Key = tuple[str, ...]


def ways(where: Path) -> dict[Key, Row]:
    """growkern's ways of every row; `speed` is a median and its quartiles, the higher the better."""
    found = {}
    for row in results.rows(where):
        timed = {way.get("kind"): way["way"] for way in reversed(row["ways"]) if "ms" in way}
        rival = next((timed[kind] for kind in RIVALS if kind in timed), None)
        for way in row["ways"]:
            if way.get("kind") == "growkern":
                if "ms" in way:
                    times = [1 / way["ms"], 1 / way["high"], 1 / way["low"]]
                    way["speed"] = way["over"][rival] if rival else times
                found[(*results.identity(row), way["way"])] = way
    return found


def changes(old: dict[Key, Row], new: dict[Key, Row], tolerance: float) -> Iterator[tuple[Key, str, bool]]:
    """Key, what changed, and whether for the worse."""
    for key, before in old.items():
        after = new.get(key)
        if "speed" not in before:
            continue
        if after is None:
            yield key, "missing", True
        elif "speed" not in after:
            yield key, after.get("failed", "not timed"), True
        else:
            (was, low, high), (now, least, most) = before["speed"], after["speed"]
            told = f"{was:.3g} → {now:.3g} ({(now / was - 1) * 100:+.0f}%), {before['ms']:.4g} → {after['ms']:.4g} ms"
            if now < was * (1 - tolerance) and most < low:
                yield key, told, True
            elif now > was * (1 + tolerance) and least > high:
                yield key, told, False
            if after["MiB"] > before["MiB"] * (1 + tolerance) + LEAST_MIB:
                yield key, f"{before['MiB']:.4g} → {after['MiB']:.4g} MiB", True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1)
    chosen = parser.parse_args()
    old, new = ways(chosen.old), ways(chosen.new)
    found = list(changes(old, new, chosen.tolerance))
    for worse in (True, False):
        for key, told, is_worse in found:
            if is_worse == worse:
                print("SLOWER" if worse else "faster", *key, told, sep="  ")
    worse = sum(is_worse for _, _, is_worse in found)
    print(f"{len(old.keys() & new.keys())} ways in both: {worse} worse, {len(found) - worse} faster")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
