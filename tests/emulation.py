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
FLAGS = (
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-shared",
    "-fPIC",
    "-U_FORTIFY_SOURCE",
    "-ffp-contract=off",
)


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


class Moments:
    """The kernels of the moments, under one order of threads."""

    DTYPES = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def correlate(self, us, vs, pitches, channels, aligned, out, products, items, signs, block, tf32) -> None:
        sides = (ctypes.c_void_p * 8)(*(each.data_ptr() for each in (*us, *vs)))
        dtypes = (self.DTYPES.index(us[0].dtype), self.DTYPES.index(vs[2].dtype))
        pitch = 0 if signs is None else signs.stride(0)
        library("moments").correlate(
            sides, integers(pitches), integers(channels), aligned, ctypes.c_int64(len(us[0])), *dtypes, pointer(out),
            pointer(products), pointer(items), len(items), pointer(signs), ctypes.c_int64(pitch),
            block, int(tf32), self.seed,
        )  # fmt: skip

    def reduce(self, workspace, sums, elements) -> None:
        library("moments").reduce(pointer(workspace), pointer(sums), len(sums), elements, self.seed)

    def correlate_group(self, sources, drawn, unit, u, v, out, products, items, block, tf32) -> None:
        dtypes = (self.DTYPES.index(u.dtype), self.DTYPES.index(v.dtype))
        tables = (pointer(products), pointer(items), len(items))
        library("moments").correlate_group(
            pointer(sources), pointer(drawn), unit, *dtypes, pointer(out), *tables, block, tf32, self.seed
        )

    def pack(self, copies, source, target, programs, pixels, channels) -> None:
        assert (pixels, channels) == (64, 16)
        sizes = (source.itemsize, target.itemsize)
        library("moments").pack(pointer(copies), len(copies), *sizes, programs, self.seed)

    def combine(self, workspace, sums, signs, drawn, draws, slots, add, elements, draws_at_once) -> None:
        assert (elements, draws_at_once) == (128, 32)
        pitch, samples = (0, 0) if signs is None else (signs.stride(0), signs.shape[1])
        library("moments").combine(
            pointer(workspace), pointer(sums), len(sums), pointer(signs), ctypes.c_int64(pitch),
            ctypes.c_int64(samples), pointer(drawn), draws, ctypes.c_int64(slots), int(add), self.seed,
        )  # fmt: skip

    def assemble(self, slots, results, addresses, regions, starts, terms, weights, programs, rows, columns) -> None:
        targets = (ctypes.c_void_p * len(results))(*(each.data_ptr() for each in results))
        library("moments").assemble(
            pointer(slots), ctypes.c_int64(slots.stride(0)), len(slots), targets, len(results),
            pointer(addresses), pointer(regions), len(regions), pointer(starts), pointer(terms), pointer(weights),
            programs, rows, columns, self.seed,
        )  # fmt: skip

    def subtract(self, h, v, pitches, whole, channels, aligned, weight, out, kernel, block, tf32) -> None:
        assert weight.is_contiguous()
        rows, columns = v.shape[1:3] if v.ndim == 4 else (1, 1)
        map_rows, map_columns = h.shape[1:3] if h.ndim == 4 else (1, 1)
        sizes = (len(v) * rows * columns, weight.shape[1], rows, columns, map_rows, map_columns)
        dtypes = (self.DTYPES.index(h.dtype), self.DTYPES.index(v.dtype))
        library("moments").subtract(
            pointer(h), pointer(v), integers(pitches), ctypes.c_int64(whole), ctypes.c_int64(channels), aligned,
            *dtypes, pointer(weight), pointer(out), integers(sizes), integers(kernel), block, tf32, self.seed,
        )  # fmt: skip

    def subtract_group(self, sites, programs, like, unit, block, tf32) -> None:
        dtype = self.DTYPES.index(like.dtype)
        library("moments").subtract_group(pointer(sites), len(sites), programs, dtype, unit, block, tf32, self.seed)


def integers(numbers) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)
