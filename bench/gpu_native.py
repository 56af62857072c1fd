"""The GPU backends beside PyTorch on the bench rows of tests/cases.py: cold caches, after a check against float64.

python bench/gpu_native.py OUT_DIR [--only TEXT] [--seconds N] [--device cuda|cpu] writes OUT_DIR/gpu-native.json and
prints a table. With --device cpu the same rows run on the backends of the CPU: a rehearsal, its times mean little.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cpu_native import by_unfold, six_products
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cases import TOLERANCES, Case, Conv2dCase, cases, error, to_double

from growkern.backend import DEVICES, available, use_backend
from growkern.ops.native import build_info

OPS = ("conv2d_moments", "linear_moments", "eigh", "svd", "conv2d_residual", "linear_residual")
FLUSH_BYTES = 256 << 20  # more than any L2 holds
Record = dict[str, object]


class Clock:
    """Times of candidates taken in turns, each run with a cold L2."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flushed = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], object]) -> float:
        self.flushed.zero_()
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
        taken: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(repeats + 2):
            for name, run in candidates.items():
                seconds = self.seconds(run)
                if turn > 1:
                    taken[name].append(seconds)
        return {name: statistics.median(values) for name, values in taken.items()}

    def memory(self, run: Callable[[], object]) -> int:
        """Bytes beyond what was held before, at the most."""
        if not self.cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def usual(case: Case, args: tuple[Tensor, ...], named: dict[str, object]) -> Callable[[], object]:
    """What people write in PyTorch, in the dtype of the inputs and without ones columns."""
    if case.op in ("eigh", "svd"):
        options = {"full_matrices": False} if case.op == "svd" else {}
        return lambda: getattr(torch.linalg, case.op)(*args, **options)
    if case.op == "linear_moments":
        return lambda: six_products(*args)

    def unfolded() -> object:
        torch.set_default_dtype(args[0].dtype)
        try:
            with torch.device(args[0].device):
                return by_unfold(*args, named["producer"], named["consumer"])
        finally:
            torch.set_default_dtype(torch.float32)

    def reference() -> object:
        with use_backend("reference"):
            return case.function(*args, **named)

    return unfolded if case.op == "conv2d_moments" else reference


def wrong(case: Case, out: tuple[Tensor, ...], args: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest relative error; of decompositions, that of what they put together again."""
    if case.op == "eigh":
        return error((out[1] * out[0][..., None, :]) @ out[1].mT, args[0].double())
    if case.op == "svd":
        return error((out[0] * out[1][..., None, :]) @ out[2], args[0].double())
    return max(map(error, out, expected))


def operations(case: Case) -> float:
    """Of 3×3 moments at stride 1 with kernel="full", counted as in csrc/README.md; 0 for others."""
    if not isinstance(case, Conv2dCase) or case.op != "conv2d_moments" or case.kernel != "full":
        return 0.0
    height, width = case.maps
    return 61 * 2 * case.channels[0] ** 2 * case.batch * height * width


def rows() -> Iterator[tuple[Case, torch.dtype, str]]:
    """Moments in single and half precision, decompositions in single and double; one kernel of convolutions."""
    for op in OPS:
        for case in cases(op, size="bench"):
            if getattr(case, "kernel", "full") == "center":
                continue
            for dtype in case.dtypes:
                if op in ("eigh", "svd"):
                    yield case, dtype, "ieee"
                elif dtype != torch.float64:
                    yield from ((case, dtype, each) for each in ("ieee", "tf32")[: 1 + (dtype == torch.float32)])


def row(case: Case, dtype: torch.dtype, precision: str, device: str, clock: Clock, repeats: int) -> list[Record]:
    args, named = case.arguments(dtype, device=device)
    if case.op not in ("eigh", "svd"):
        named["precision"] = precision
    tolerance = (
        2e-3 if precision == "tf32" else 10 * TOLERANCES[dtype] if case.op in ("eigh", "svd") else TOLERANCES[dtype]
    )
    expected = ()
    if case.op not in ("eigh", "svd"):
        with use_backend("reference"):
            expected = case.function(*to_double((args, named))[0], **to_double((args, named))[1])
    candidates: dict[str, Callable[[], object]] = {}
    errors, failures = {}, {}
    backends = [b for b in available(case.op) if b != "reference" and device in DEVICES.get(b, (device,))]
    for backend in backends:

        def run(backend: str = backend) -> tuple[Tensor, ...]:
            with use_backend(backend):
                return case.function(*args, **named)

        try:
            errors[backend] = wrong(case, run(), args, expected)
        except Exception as failure:  # one backend must not cost the figures of the others
            failures[backend] = f"{type(failure).__name__}: {failure}"[:300]
            continue
        if errors[backend] <= tolerance:
            candidates[backend] = run
        else:
            failures[backend] = f"error {errors[backend]:.1e} beyond {tolerance:.1e}"
    torch.backends.cuda.matmul.fp32_precision = precision
    memory = {name: clock.memory(run) for name, run in candidates.items()}
    took = clock.medians({**candidates, "torch": usual(case, args, named)}, repeats)
    common = {"case": str(case), "dtype": str(dtype).removeprefix("torch."), "precision": precision}
    records: list[Record] = [{**common, "backend": name, "failed": why} for name, why in failures.items()]
    for name, seconds in took.items():
        record: Record = {**common, "backend": name, "ms": round(seconds * 1e3, 4)}
        if name != "torch":
            record |= {"over torch": round(took["torch"] / seconds, 2), "error": errors[name]}
            record |= {"MiB beyond inputs": round(memory[name] / 2**20, 1)}
        if name != "torch" and operations(case):
            record["TFLOP/s counted"] = round(operations(case) / seconds / 1e12, 2)
        records.append(record)
    return records


def show(record: Record) -> str:
    told = record.get("failed") or "  ".join(f"{name} {value}" for name, value in list(record.items())[4:])
    return f"{record['case']:42} {record['dtype']:9} {record['precision']:5} {record['backend']:7} {told}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=120, help="start no row after this time")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    start, clock, records = time.monotonic(), Clock(chosen.device), []
    hardware = {"torch": torch.__version__, "cuda": torch.version.cuda, "build": build_info()}
    if clock.cuda:
        hardware["gpu"] = torch.cuda.get_device_name()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for case, dtype, precision in rows():
        if chosen.only not in f"{case} {dtype} {precision}":
            continue
        if time.monotonic() - start < chosen.seconds:
            found = row(case, dtype, precision, chosen.device, clock, chosen.repeats)
        else:
            found = [{"case": str(case), "dtype": str(dtype), "precision": precision, "backend": "all"}]
            found[0]["failed"] = "no time left"
        records += found
        print("\n".join(map(show, found)), flush=True)
        text = json.dumps({"hardware": hardware, "results": records}, indent=1, ensure_ascii=False)
        (chosen.out / "gpu-native.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
