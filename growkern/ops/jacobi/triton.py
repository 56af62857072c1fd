"""Batched decompositions by Triton: one program per matrix of at most 64 columns; for more, the next best."""

from typing import Any

import torch
from torch import Tensor

from growkern.backend import register
from growkern.ops import native
from growkern.ops.jacobi import reference

HAS_CUDA = native.load("cuda")
if HAS_CUDA:
    from growkern.ops.jacobi import cuda

LARGEST = 64  # columns that fit into the registers of one program
TALLEST = 64  # rows beside them; taller matrices are factored first
SWEEPS = 30
OFF = {torch.float32: 3e-7, torch.float64: 1e-15}  # the off-diagonal part at convergence, relative to the whole
NEGLIGIBLE = {torch.float32: 1e-30, torch.float64: 1e-280}  # squared length of a column beside a largest entry of 1


def padded(length: int) -> int:
    """Side of the tile that holds `length` rows or columns."""
    return max(16, 1 << (length - 1).bit_length())


def eigh_options(n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of `eigh_kernel` for (n, n) matrices."""
    side = padded(n)
    return {"TOLERANCE": OFF[dtype], "SWEEPS": SWEEPS, "N": side} | _resources(side * side)


def svd_options(m: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of `svd_kernel` for (m, n) matrices, m ≥ n."""
    rows, columns = padded(m), padded(n)
    tolerance = 3 * rows**0.5 * torch.finfo(dtype).eps
    options = {"TOLERANCE": tolerance, "TINY": NEGLIGIBLE[dtype], "SWEEPS": SWEEPS, "M": rows, "N": columns}
    return options | _resources(rows * columns)


def _resources(entries: int) -> dict[str, int]:
    """Warps for a tile; all registers are allowed, or ptxas spills some of them for the sake of more programs."""
    warps = 2 if entries == 256 else 4 if entries <= 512 else 8
    return {"num_warps": warps} | ({} if torch.version.hip else {"maxnreg": 255})


def _beyond(a: Tensor) -> Any:
    """Choose what takes the matrices that do not fit: kernels that hold larger ones, or torch.linalg, one by one."""
    return cuda if HAS_CUDA and a.is_cuda else reference


@register("eigh", "triton")
def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; NaN where a matrix has none to find."""
    n = a.shape[-1]
    if not a.numel() or n > LARGEST:
        return _beyond(a).eigh(a)
    from growkern.ops.jacobi._triton import eigh_kernel

    a = a.contiguous()
    w, q = a.new_empty(a.shape[:-1]), torch.empty_like(a)
    with torch.cuda.device_of(a):
        eigh_kernel[(a.shape[:-2].numel(),)](a, w, q, n, **eigh_options(n, a.dtype))
    return w, q


@register("svd", "triton")
def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced singular value decomposition; NaN where a matrix has none to find."""
    *batch, m, n = a.shape
    if not a.numel() or min(m, n) > LARGEST:
        return _beyond(a).svd(a)
    if m < n:
        u, s, vh = svd(a.mT)
        return vh.mT.contiguous(), s, u.mT.contiguous()
    if m > TALLEST:
        basis, triangle = torch.linalg.qr(a)
        u, s, vh = svd(triangle)
        # In float64, because float32 products are TF32 where the user allows it.
        return (basis.double() @ u.double()).to(a.dtype), s, vh
    from growkern.ops.jacobi._triton import svd_kernel

    a = a.contiguous()
    u, s, vh = torch.empty_like(a), a.new_empty(*batch, n), a.new_empty(*batch, n, n)
    with torch.cuda.device_of(a):
        svd_kernel[(a.shape[:-2].numel(),)](a, u, s, vh, m, n, **svd_options(m, n, a.dtype))
    return u, s, vh
