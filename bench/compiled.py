"""Compile the Triton kernels for GPUs that need not be here: the moments as the bench rows of tests/cases.py launch
them, and `eigh` and `svd` with every tile.

python bench/compiled.py [--only TEXT ...] [--targets NAME ...] tells registers, spills, shared memory and matrix
instructions, fails on a spill, and writes bench/results/compiled.json where nothing is left out. TEXT is part of the
name of a case, such as "64ch", "width 32-full" or "svd 64×16".
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from growkern.ops.jacobi import _triton as _decompose
from growkern.ops.jacobi import triton as decomposers
from growkern.ops.moments import Call, Residual, _triton, gpu, group
from growkern.ops.moments import triton as engine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from cases import Conv2dCase, LinearCase, cases  # noqa: E402

TARGETS = {
    **{f"sm_{version}": GPUTarget("cuda", version, 32) for version in (80, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program may take
MATRIX = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async|mma\.sync", "sm_100": r"tcgen05\.mma|mma\.sync"}
MATRIX["gfx942"] = r"v_mfma"
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}
KERNELS = ("pack", "correlate", "reduce", "combine", "assemble", "subtract", "subtract_group")
MULTIPLYING = ("correlate", "combine", "subtract", "subtract_group")
POINTERS = {"eigh": 3, "svd": 4}  # arguments that are tensors
SIDES = (16, 32, 64)
ROWS_PER_SIGN = 64

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@contextmanager
def recorded(launches: list[Launch]) -> Iterator[None]:
    """Note down what would be launched."""

    def recorder(kernel: Any) -> Any:
        class Recorder:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *arguments, **named: launches.append((kernel, arguments, named))

        return Recorder()

    with ExitStack() as stack:
        for name in (f"{kernel}_kernel" for kernel in KERNELS):
            stack.enter_context(mock.patch.object(_triton, name, recorder(getattr(_triton, name))))
        yield


class Elsewhere:
    """What Triton asks the driver of a GPU before it compiles, for one that need not be here."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def built(launch: Launch) -> Any:
    """Compile for the driver in force what a launch would run, into the same place of Triton's cache."""
    kernel, arguments, named = launch
    return kernel.warmup(*arguments, grid=(1,), **named)


def kind(launch: Launch) -> tuple[Any, ...]:
    """What tells kernels apart: types, and of numbers what Triton specialises for."""
    kernel, arguments, named = launch

    def of(parameter: Any, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        special = not parameter.do_not_specialize
        return abs(value) >= 2**31, special and value == 1, special and value % 16 == 0

    facts = (of(*each) for each in zip(kernel.params, arguments, strict=False))
    return kernel.__name__, *facts, *((name, str(value)) for name, value in named.items())


def resources(target: str, done: Any) -> tuple[int, int]:
    """Registers per thread, and bytes or registers that were spilled to memory."""
    if target.startswith("gfx"):
        text = done.asm["amdgcn"]
        found = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        return found["vgpr_count"], found["vgpr_spill_count"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told.stdout).groups())
    return registers, stack + local


def launched(case: Conv2dCase | LinearCase, dtype: torch.dtype, precision: str, target: str) -> list[Launch]:
    """What a call of the case launches; its tensors have no memory."""
    arguments, named = case.arguments(dtype, device="meta")
    launches: list[Launch] = []
    amd = target.startswith("gfx")
    kind = "hip" if amd else f"capability {int(target[3:]) // 10}"
    with (
        recorded(launches),
        mock.patch.object(engine, "gpu_of", return_value=("", kind)),
        mock.patch.object(gpu, "processors_of", return_value=132),
        mock.patch.dict(group._kept, clear=True),  # those of other GPUs
        mock.patch.object(torch.version, "hip", "7" if amd else None),
    ):
        flags = {"x_bias": case.x_bias, "h_bias": case.h_bias, "precision": precision}
        if isinstance(case, Conv2dCase):
            flags |= {"producer": case.producer, "consumer": case.consumer, "kernel": case.kernel}
        call = Call(*arguments[:3], **flags)
        if case.op.endswith("moments"):
            gpu.moments(engine, call)
            group.grouped_moments(engine, [call] * 3)
        else:
            signs, run = named["signs"], named.get("rows_per_sign", 1)
            runs = (signs[:, : -(-len(call.x) // ROWS_PER_SIGN)], ROWS_PER_SIGN)
            for residual in (
                Residual(call, arguments[3], signs, run),
                Residual(call, arguments[3].double(), *(runs if call.producer is None and run == 1 else (signs, run))),
            ):
                gpu.residual(engine, residual)
                group.grouped_residuals(engine, [residual] * 3)
    return launches


def decompositions() -> Iterator[tuple[str, Launch]]:
    """Names of the cases of `eigh` and `svd`, and what they launch."""
    for dtype, op, m, n in itertools.product((torch.float32, torch.float64), POINTERS, SIDES, SIDES):
        if m == n or (op == "svd" and m > n):
            sizes = (n,) if op == "eigh" else (m, n)
            options = getattr(decomposers, f"{op}_options")(*sizes, dtype)
            tensors = [torch.empty(1, dtype=dtype, device="meta")] * POINTERS[op]
            yield f"{op} {m}×{n}", (getattr(_decompose, f"{op}_kernel"), (*tensors, *(7,) * len(sizes)), options)


def measure(launch: Launch, target: str) -> dict[str, Any]:
    kernel, arguments, named = launch
    if target.startswith("gfx"):
        named = {name: value for name, value in named.items() if name != "maxnreg"}
    done = built((kernel, arguments, named))
    registers, spilled = resources(target, done)
    text = done.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    row = {
        "kernel": kernel.__name__.removesuffix("_kernel"),
        "target": target,
        **{name: str(value).removeprefix("triton.language.") for name, value in named.items()},
        "dtypes": " ".join(dict.fromkeys(f"*{TYPES[each.dtype]}" for each in arguments if isinstance(each, Tensor))),
        "registers": registers,
        "spilled": spilled,
        "shared": done.metadata.shared,
        "matrix instructions": len(re.findall(MATRIX[target], text)),
    }
    assert not spilled, row
    assert row["shared"] <= SHARED[target], row
    assert row["matrix instructions"] or row["kernel"] not in MULTIPLYING, row
    return row


def chosen_launches(only: list[str], target: str) -> Iterator[Launch]:
    """What the cases launch whose names hold one of some texts."""
    ops = ("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual")
    given = cases(*ops, size="bench")
    few = [case for case in given if case.op == "conv2d_moments" and case.channels[0] in (64, 256)]
    given += [replace(case, name=f"3, then {case.channels[1]}", channels=(3, *case.channels[1:])) for case in few]
    for case in given:
        if any(text in str(case) for text in only):
            for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
                yield from launched(case, dtype, precision, target)
    for name, launch in decompositions():
        if any(text in name for text in only):
            yield launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of cases")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    chosen = parser.parse_args()
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for target in chosen.targets:
        driver.set_active(Elsewhere(TARGETS[target]))
        for launch in chosen_launches(chosen.only, target):
            key = *kind(launch), target
            if key not in rows:
                rows[key] = measure(launch, target)
                print(*rows[key].values(), flush=True)
    if chosen.only == [""] and chosen.targets == list(TARGETS):
        lines = ",\n".join(json.dumps(row) for row in rows.values())
        path = ROOT / "bench" / "results" / "compiled.json"
        path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
