"""Compile the Triton kernels of `eigh` and `svd` for GPUs that need not be here: registers, spills, shared memory.

python bench/jacobi_compiled.py [--sides N ...] writes bench/results/jacobi-compiled.json unless sides are chosen.
"""

import argparse
import json
from pathlib import Path

import torch
import triton
from triton.compiler import ASTSource
from triton_compiled import SHARED, TARGETS, resources

from growkern.ops.jacobi import _triton
from growkern.ops.jacobi import triton as launchers

TYPES = {torch.float32: "fp32", torch.float64: "fp64"}
POINTERS = {"eigh": ("a_ptr", "w_ptr", "q_ptr"), "svd": ("a_ptr", "u_ptr", "s_ptr", "vh_ptr")}


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
