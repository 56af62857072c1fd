"""The CUDA kernels compiled for the host and run by tests/cuda_emulation: what growkern_cuda offers, on CPU tensors."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from growkern import backend

FOLDER = Path(__file__).parent / "cuda_emulation"
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off")


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Compile tests/cuda_emulation/<name>.cpp, once."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    path = Path(tempfile.mkdtemp()) / f"{name}.so"
    subprocess.run([compiler, *FLAGS, FOLDER / f"{name}.cpp", "-o", path], check=True)
    return ctypes.CDLL(str(path))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def unwritten(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype)


class Jacobi:
    """The decompositions, under one order of threads; vectors in shared memory or outside."""

    def __init__(self, seed: int = 0, outside: bool = False) -> None:
        self.seed, self.outside = seed, outside

    def eigh(self, a: Tensor) -> tuple[Tensor, Tensor]:
        count, n, _ = a.shape
        w, q, scratch = unwritten(a, count, n), unwritten(a, count, n, n), unwritten(a, count, n, n | 1)
        outside = pointer(scratch if self.outside else None)
        self._run("eigh", a, w, q)(outside, count, n, self.seed)
        return w, q

    def svd(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, m, n = a.shape
        k = min(m, n)
        u, s, vh = unwritten(a, count, m, k), unwritten(a, count, k), unwritten(a, count, k, n)
        self._run("svd", a, u, s, vh)(count, m, n, self.seed)
        return u, s, vh

    def svd_fits(self, a: Tensor) -> bool:
        return min(a.shape[-2:]) <= 64

    def _run(self, name: str, a: Tensor, *results: Tensor) -> functools.partial:
        assert a.is_contiguous()
        function = getattr(library("jacobi"), f"{name}_{str(a.dtype).removeprefix('torch.')}")
        return functools.partial(function, pointer(a), *map(pointer, results))


def on_cpu(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """For the time of a test, let CPU tensors reach the backend "cuda", and forget what is registered meanwhile."""
    monkeypatch.setitem(backend.DEVICES, "cuda", ("cpu",))
    for op in ops:
        monkeypatch.setitem(backend._implementations, op, dict(backend._implementations[op]))
