"""Which machine, which software, and what this machine can do at most."""

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from clock import Clock

import growkern
from growkern.ops.moments.reference import matmul_precision
from growkern.ops.native import build_info

ROOT = Path(__file__).parents[1]
PACKAGES = ("triton", "gromo", "pytest-benchmark", "cupy-cuda13x")
# Sizes at which matrix products and copies run as fast as they do here, and in how many runs the best is sought.
SIDE, COPIED, RUNS = {"cpu": 1536, "cuda": 8192}, {"cpu": 256 << 20, "cuda": 1 << 30}, 4


def hardware(device: str) -> dict[str, Any]:
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        size = f"{found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
        return {"name": found.name, "memory": size, "cuda": torch.version.cuda}
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    return {
        "name": model[1] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "instruction sets": sorted(set(re.findall(r"\b(avx2|avx512f|avx512_bf16|fma)\b", info))),
    }


def folder(hardware: dict[str, Any]) -> str:
    """Name of a machine as a folder's."""
    threads = f" {hardware['threads']} threads" if "threads" in hardware else ""
    return re.sub(r"\W+", "-", hardware["name"] + threads).strip("-").lower()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "growkern": growkern.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the working tree, with a mark if it holds changes; empty without git."""
    try:
        asked = ["git", "describe", "--always", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def ceilings(clock: Clock) -> dict[str, float]:
    """Best of a few: matrix products by dtype and precision in TFLOP/s, and a copy in GB/s."""
    device = "cuda" if clock.cuda else "cpu"
    source = torch.ones(COPIED[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def best(run: Any) -> float:
        return min(clock.seconds(run) for _ in range(RUNS))

    found = {"GB/s": 2 * source.numel() / best(lambda: target.copy_(source)) / 1e9}
    for dtype, precision in (
        (torch.float64, "ieee"),
        (torch.float32, "ieee"),
        *((torch.float32, "tf32"),) * clock.cuda,
        (torch.bfloat16, "ieee"),
        *((torch.float16, "ieee"),) * clock.cuda,  # a CPU multiplies it as float32, or very slowly
    ):
        a = torch.randn(SIDE[device], SIDE[device], device=device).to(dtype)
        with matmul_precision(a.device, precision):
            found[ceiling_of(dtype, precision)] = 2 * SIDE[device] ** 3 / best(lambda a=a: a @ a) / 1e12
    return found


def ceiling_of(dtype: torch.dtype, precision: str) -> str:
    """Name of the ceiling of matrix products."""
    return f"TFLOP/s {'tf32' if precision == 'tf32' else str(dtype).removeprefix('torch.')}"


def run_record(device: str, clock: Clock) -> dict[str, Any]:
    """What all rows of one run have in common."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "at": now.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        "hardware": hardware(device),
        "versions": versions(),
        "build": build_info(),
        "load average": round(os.getloadavg()[0], 1),
        "ceilings": {name: float(f"{value:.4g}") for name, value in ceilings(clock).items()},
    }
