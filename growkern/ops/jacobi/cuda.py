"""Batched decompositions by the kernels of csrc/jacobi, one matrix per block."""

import torch
from torch import Tensor

from growkern.backend import register
from growkern.ops.jacobi import reference

native = torch.ops.growkern_cuda

LARGEST = 128  # rows and columns that `eigh` takes


@register("eigh", "cuda")
def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; NaN where a matrix has none to find."""
    n, matrices = a.shape[-1], a.shape[:-2].numel()
    if n > LARGEST or not a.numel():
        return reference.eigh(a)
    w, q = native.eigh(a.reshape(matrices, n, n).contiguous())
    return w.view(a.shape[:-1]), q.view(a.shape)


@register("svd", "cuda")
def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced singular value decomposition; NaN where a matrix has none to find."""
    *batch, m, n = a.shape
    matrices, k = a.shape[:-2].numel(), min(m, n)
    if not a.numel() or not native.svd_fits(a):
        return reference.svd(a)
    u, s, vh = native.svd(a.reshape(matrices, m, n).contiguous())
    return u.view(*batch, m, k), s.view(*batch, k), vh.view(*batch, k, n)
