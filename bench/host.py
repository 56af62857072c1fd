"""What a call for a group of sites costs the host where all about its shapes is known, with kernels that do nothing.

python bench/host.py [--repeats N]: milliseconds of the first and the second pass, the least and the median. No GPU is
needed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

from growkern import backend
from growkern.ops.moments import Call, group, grouped_moments, grouped_residuals

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench_sites import TWENTY_MAPS, TWENTY_WIDTHS, linear_calls, map_calls, with_draws
from no_kernels import NoKernels


def host(name: str, calls: list[Call], repeats: int) -> dict[str, object]:
    row: dict[str, object] = {"case": name}
    for op, given in ((grouped_moments, calls), (grouped_residuals, with_draws(calls))):
        taken = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            op(given)
            taken.append(time.perf_counter() - start)
        figures = {"least": min(taken[2:]), "median": statistics.median(taken[2:]), "first": taken[0]}
        row[op.__name__] = {key: f"{value * 1e3:.3f} ms" for key, value in figures.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    group.serve(NoKernels(), "triton")
    with (
        mock.patch.dict(backend.DEVICES, {"triton": ("cpu",)}),
        mock.patch.object(backend, "_is_here", return_value=True),
        backend.use_backend("triton"),
    ):
        print(host("20 linear sites", linear_calls(TWENTY_WIDTHS, 4096, "cpu"), repeats))
        print(host("20 convolutions", map_calls(TWENTY_MAPS, 32, "cpu"), repeats))


if __name__ == "__main__":
    main()
