"""Where the time of `conv2d_moments` goes on a GPU: milliseconds of every kernel of one call, by torch's profiler.

python bench/parts.py [--only TEXT ...]: one line for each case, dtype, precision and backend; TEXT is part of a name.
"""

import argparse
import itertools
import sys
from collections import defaultdict
from pathlib import Path

import torch
from race import own_ways
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import Case, cases

OPERANDS = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"))
REPEATS = 5


def parts(case: Case, dtype: torch.dtype, precision: str) -> None:
    args, named = case.arguments(dtype, device="cuda")
    for way in own_ways(case.op, lambda: case.function(*args, **named, precision=precision), "cuda", 0.0):
        way.run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(REPEATS):
                way.run()
            torch.cuda.synchronize()
        taken: dict[str, float] = defaultdict(float)
        for event in profiled.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                taken[event.name.split("<")[0].split("(")[0][:40]] += event.time_range.elapsed_us() / 1e3 / REPEATS
        ordered = sorted(taken.items(), key=lambda each: -each[1])
        told = ", ".join(f"{name} {ms:.3f}" for name, ms in ordered)
        print(f"{case} {dtype} {precision} {way.name}: {sum(taken.values()):.3f} ms: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of cases")
    only = parser.parse_args().only
    for case, operands in itertools.product(cases("conv2d_moments", size="bench"), OPERANDS):
        if any(text in str(case) for text in only):
            parts(case, *operands)


if __name__ == "__main__":
    main()
