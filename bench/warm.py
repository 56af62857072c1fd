"""Compile what the tests, the benches and `growkern tune` launch on the GPU at hand, on all processors at once.

python bench/warm.py [--widths 64,256]: Triton compiles a kernel where it first meets it, half a second or more each and
one after the other; afterwards all are in its cache. Widths are those that are going to be tuned.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from compiled import Launch, built, decompositions, kind, launched, recorded

from growkern.ops.moments import gpu, tiles, tune

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import cases

OPS = ("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual")

Task = Callable[[str], list[Launch]]  # by the name of a target

_tasks: list[Task] = []  # the processes inherit them


def of_decompositions() -> Iterator[Task]:
    for _, launch in decompositions():
        yield lambda target, launch=launch: [launch]


def of_cases() -> Iterator[Task]:
    for size in ("bench", "scaling", "test"):
        for case in cases(*OPS, size=size):
            for dtype in case.dtypes:
                for precision in ("ieee", "tf32")[: 1 + (dtype == torch.float32)]:
                    if dtype != torch.float64:  # which is the reference's
                        yield partial(launched, case, dtype, precision)


def of_tuning(widths: list[int]) -> Iterator[Task]:
    """What is tried first: single changes of the tiles that are in use."""
    for given in itertools.product(("map", "matrix"), tune.OPERANDS, widths):
        for change in ({}, *tune.CHANGES):
            yield partial(candidate, *given, change)


def candidate(sort: str, operands: str, width: int, change: dict[str, int], target: str) -> list[Launch]:
    launches: list[Launch] = []
    cut = tiles.choose(tiles.gpu_of(torch.device("cuda")), sort, operands, width)._replace(**change)
    if tune._fits(cut, sort, width):
        tensors = [torch.empty(tune._shape(sort, width), dtype=tune.OPERANDS[operands], device="meta")] * 3
        with recorded(launches):
            tune._moments(gpu, tensors, "tf32" if operands == "tf32" else "ieee", tune._with_tiles(cut))
    return launches


def run(number: int) -> tuple[set[object], list[str]]:
    """Compile what one task launches; what it is, and what went wrong."""
    torch.set_num_threads(1)
    major, minor = torch.cuda.get_device_capability()
    found, failed = set(), []
    for launch in _tasks[number](f"sm_{major}{minor}"):
        found.add(kind(launch))
        try:
            built(launch)
        except Exception as error:  # a candidate may not fit, and a kernel that does not compile fails where it is run
            failed.append(f"{launch[0].__name__}: {type(error).__name__}: {error}"[:200])
    return found, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,256")
    widths = [int(width) for width in parser.parse_args().widths.split(",")]
    _tasks.extend((*of_decompositions(), *of_cases(), *of_tuning(widths)))
    start, found, failed = time.monotonic(), set(), []
    with multiprocessing.get_context(
        "fork"
    ).Pool() as pool:  # CUDA is asked for nothing here, so that a fork may use it
        for kinds, errors in pool.imap_unordered(run, range(len(_tasks))):
            found |= kinds
            failed += errors
    for error in dict.fromkeys(failed):
        print(error)
    print(f"{len(found)} kernels in {time.monotonic() - start:.0f} s, {len(failed)} of which failed")


if __name__ == "__main__":
    main()
