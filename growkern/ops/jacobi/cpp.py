"""Batched decompositions on the CPU: one matrix per SIMD lane, or LAPACK on one matrix per thread."""

from collections.abc import Callable

import torch
from torch import Tensor

from growkern.backend import register
from growkern.ops.jacobi import reference

native = torch.ops.growkern_cpu

LARGEST_IN_LANES = 128  # rows and columns: beyond, LAPACK is as fast
# Where Jacobi's method was measured faster than the QL method: the largest matrix, and the smallest batch.
JACOBI = {torch.float32: (16, 32), torch.float64: (8, 8)}


@register("eigh", "cpp")
def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; NaN where a matrix has none to find."""
    n, matrices = a.shape[-1], a.shape[:-2].numel()
    if not matrices or not 0 < n <= LARGEST_IN_LANES:
        w, q = _sliced(native.eigh_lapack, reference.eigh, a)
        return w, q
    largest, fewest = JACOBI[a.dtype]
    w, q = native.eigh_lanes(a.reshape(matrices, n, n).contiguous(), n > largest or matrices < fewest)
    return w.view(a.shape[:-1]), q.view(a.shape)


@register("svd", "cpp")
def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced singular value decomposition; NaN where a matrix has none to find."""
    u, s, vh = _sliced(native.svd_lapack, reference.svd, a)
    return u, s, vh


def _sliced(
    decompose: Callable[[Tensor], tuple[Tensor, ...]], whole: Callable[[Tensor], tuple[Tensor, ...]], a: Tensor
) -> tuple[Tensor, ...]:
    """Give each thread a slice of the batch, unless there is nothing to slice or a matrix that LAPACK refuses."""
    if a.shape[:-2].numel() < 2 or not a.numel() or torch.get_num_threads() == 1 or not reference.all_finite(a):
        return whole(a)
    try:
        parts = decompose(a.flatten(0, -3).contiguous())
    except RuntimeError:  # one of them did not converge
        return whole(a)
    return tuple(part.unflatten(0, a.shape[:-2]) for part in parts)
