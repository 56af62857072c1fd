"""What is installed, which backends run on this machine, and how to get those that do not."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import growkern
from growkern import ops, use_backend
from growkern.backend import BACKENDS, DEVICES, available
from growkern.ops.native import build_info

PACKAGES = ("triton", "numpy", "safetensors", "typer", "rich", "torchvision", "matplotlib", "tensorboard")
_ABSENT = {
    "triton": "it needs the package triton and a GPU",
    "cuda": "it needs a GPU and its library; with a torch for CUDA and the nvcc of its CUDA version: "
    "pip install --no-build-isolation --force-reinstall --no-deps growkern",
    "cpp": "the compiled library was not built; with a C++ compiler: "
    "pip install --no-build-isolation --force-reinstall --no-deps growkern",
}


def _cases(device: str) -> dict[str, Callable[[torch.dtype], tuple[Tensor, ...]]]:
    """One small call of each op, in a given dtype, on the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    rows = drawn(500, 33), drawn(500, 17), drawn(500, 10)
    maps = drawn(8, 6, 12, 12), drawn(8, 5, 12, 12), drawn(8, 4, 12, 12)
    update, conv_update, square = drawn(10, 17), drawn(4, 45), drawn(16, 24, 24)
    layer = ops.ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
    geometry: dict[str, Any] = {"producer": layer, "consumer": layer}
    return {
        "linear_moments": lambda t: ops.linear_moments(*(a.to(t) for a in rows)),
        "linear_residual": lambda t: ops.linear_residual(*(a.to(t) for a in (*rows, update))),
        "conv2d_moments": lambda t: ops.conv2d_moments(*(a.to(t) for a in maps), **geometry),
        "conv2d_residual": lambda t: ops.conv2d_residual(*(a.to(t) for a in (*maps, conv_update)), **geometry),
        "eigh": lambda t: ops.eigh((square + square.mT).to(t))[:1],
        "svd": lambda t: (ops.svd(square.to(t))[1],),
    }


def examine(console: Console) -> int:
    """Print what is here and run every backend of every op once.

    Parameters
    ----------
    console : Console
        Where to write.

    Returns
    -------
    int
        1 if a backend that is here fails or is wrong, otherwise 0.
    """
    console.print(f"growkern {growkern.__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(f"  torch {torch.__version__}", highlight=False)  # whose metadata may not name the build
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        console.print(f"  {package} {version}", highlight=False)
    console.print(
        f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            console.print(
                f"GPU {index}: {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
            )
    else:
        why = "it was built without CUDA" if torch.version.cuda is None else "it finds no GPU"
        console.print(f"GPU: none that this torch can use; {why}")
    for name, fact in (build_info() or {}).items():
        console.print(f"built with {name}: {fact}", markup=False, highlight=False, soft_wrap=True)
    if value := os.environ.get("GROWKERN_BACKEND"):
        console.print(f"GROWKERN_BACKEND={value} is in force")

    table, failed = Table(title="Every backend on one small case, float32 against float64"), False
    for name in ("backend", "op", "device", "relative error", "time"):
        table.add_column(name, justify="right" if name in ("relative error", "time") else "left")
    for backend in BACKENDS:
        names = [op for op in _cases("cpu") if backend in available(op)]
        if not names:
            console.print(f"{backend}: not here; {_ABSENT[backend]}")
        for device in (d for d in devices if names and d in DEVICES.get(backend, devices)):
            cases = _cases(device)
            for op in names:
                try:
                    error, seconds = _measure(backend, cases[op])
                except Exception as raised:  # such as a kernel that does not compile: the other backends may do
                    failed = True
                    reason = f"{backend}: {op} fails on {device}: {type(raised).__name__}: {raised}"
                    console.print(reason, markup=False, highlight=False, soft_wrap=True)
                    continue
                failed |= not error < 1e-4
                table.add_row(backend, op, device, f"{error:.1e}", f"{1e3 * seconds:.2f} ms")
    console.print(table)
    if failed:
        console.print("[red]a backend is wrong here; please report it with this page[/]")
    return int(failed)


def _measure(backend: str, case: Callable[[torch.dtype], tuple[Tensor, ...]]) -> tuple[float, float]:
    """Largest error relative to the largest entry, and the least time of five."""
    with use_backend("reference"):
        expected = case(torch.float64)
    with use_backend(backend):
        found, times = case(torch.float32), []
        for _ in range(5):
            start = time.perf_counter()
            case(torch.float32)
            if found[0].is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    errors = (
        float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True) if b.numel()
    )
    return max(errors), min(times)
