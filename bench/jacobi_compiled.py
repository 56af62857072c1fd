"""Compile the Triton kernels of `eigh` and `svd` for GPUs that need not be here: registers, spills, shared memory.

python bench/jacobi_compiled.py [--sides N ...] writes bench/results/jacobi-compiled.json unless sides are chosen.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from growkern.ops.jacobi import _triton
from growkern.ops.jacobi import triton as launchers

TARGETS = {
    **{f"sm_{version}": GPUTarget("cuda", version, 32) for version in (80, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program may take
TYPES = {torch.float32: "fp32", torch.float64: "fp64"}
POINTERS = {"eigh": ("a_ptr", "w_ptr", "q_ptr"), "svd": ("a_ptr", "u_ptr", "s_ptr", "vh_ptr")}


def resources(target: str, compiled: object) -> tuple[int, int]:
    """Registers per thread, and bytes or registers that were spilled to memory."""
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        found = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        return found["vgpr_count"], found["vgpr_spill_count"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout).groups())
    return registers, stack + local


def measure(op: str, rows: int, columns: int, dtype: torch.dtype, target: str) -> dict[str, object]:
    sizes = (columns,) if op == "eigh" else (rows, columns)
    options = getattr(launchers, f"{op}_options")(*sizes, dtype)
    warps, limit = options.pop("num_warps"), options.pop("maxnreg", None)
    kernel = getattr(_triton, f"{op}_kernel")
    signature = dict.fromkeys(POINTERS[op], "*" + TYPES[dtype])
    signature |= dict.fromkeys(("m", "n")[-len(sizes) :], "i32") | dict.fromkeys(options, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(POINTERS[op]))}  # as tensors of torch are
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=options, attrs=aligned),
        target=TARGETS[target],
        options={"num_warps": warps} | ({} if target.startswith("gfx") else {"maxnreg": limit}),
    )
    registers, spilled = resources(target, compiled)
    case = {"op": op, "tile": [rows, columns], "dtype": TYPES[dtype], "target": target, "warps": warps}
    shared = compiled.metadata.shared
    assert spilled == 0, (case, registers, spilled)
    assert shared <= SHARED[target], (case, shared)
    return case | {"registers": registers, "spilled": spilled, "shared": shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="*", default=[])
    sides = parser.parse_args().sides
    rows = [
        measure(op, m, n, dtype, target)
        for target in TARGETS
        for dtype in TYPES
        for op in POINTERS
        for n in sides or (16, 32, 64)
        for m in sides or (16, 32, 64)
        if m == n or (op == "svd" and m > n)
    ]
    for row in rows:
        print(*row.values())
    if not sides:
        path = Path(__file__).parent / "results" / "jacobi-compiled.json"
        lines = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
