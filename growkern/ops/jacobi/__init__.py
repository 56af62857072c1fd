"""Batched eigenproblems of small symmetric matrices, and singular value decompositions.

Neither op raises over what the matrices hold: one without a decomposition, because an entry is not finite or
the iteration did not converge, comes back NaN and leaves the others of its batch alone.
"""

import torch
from torch import Tensor

from growkern.backend import define
from growkern.ops import native
from growkern.ops.jacobi import reference, triton  # noqa: F401  (they register their implementations)

if native.load("cpu"):
    from growkern.ops.jacobi import cpp  # noqa: F401
if native.load("cuda"):
    from growkern.ops.jacobi import cuda  # noqa: F401

__all__ = ["eigh", "svd"]


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose symmetric matrices as a = q diag(w) qᵀ.

    Parameters
    ----------
    a : Tensor, shape (..., n, n)
        Symmetric matrices, float32 or float64; where they are not quite symmetric, the lower triangle counts.

    Returns
    -------
    w : Tensor, shape (..., n)
        Eigenvalues, ascending, in the unit of a.
    q : Tensor, shape (..., n, n)
        Orthonormal eigenvectors as columns.

    Raises
    ------
    TypeError
        If `a` is neither float32 nor float64.
    ValueError
        If `a` is not a batch of square matrices.
    """
    return torch.ops.growkern.eigh(a.detach())


def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose matrices as a = u diag(s) vh, reduced to k = min(m, n) singular values.

    Parameters
    ----------
    a : Tensor, shape (..., m, n)
        Matrices, float32 or float64.

    Returns
    -------
    u : Tensor, shape (..., m, k)
        Left singular vectors as orthonormal columns.
    s : Tensor, shape (..., k)
        Singular values, descending, in the unit of a.
    vh : Tensor, shape (..., k, n)
        Right singular vectors as orthonormal rows.

    Raises
    ------
    TypeError
        If `a` is neither float32 nor float64.
    ValueError
        If `a` is not a batch of matrices.
    """
    return torch.ops.growkern.svd(a.detach())


def _eigh_shapes(a: Tensor) -> list[tuple[int, ...]]:
    _check_dtype(a)
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a: expected a (..., n, n) tensor, got {tuple(a.shape)}")
    return [a.shape[:-1], a.shape]


def _svd_shapes(a: Tensor) -> list[tuple[int, ...]]:
    _check_dtype(a)
    if a.ndim < 2:
        raise ValueError(f"a: expected a (..., m, n) tensor, got {tuple(a.shape)}")
    *batch, m, n = a.shape
    k = min(m, n)
    return [(*batch, m, k), (*batch, k), (*batch, k, n)]


def _check_dtype(a: Tensor) -> None:
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a: expected float32 or float64, got {a.dtype}")


define("eigh", "(Tensor a) -> (Tensor w, Tensor q)", _eigh_shapes)
define("svd", "(Tensor a) -> (Tensor u, Tensor s, Tensor vh)", _svd_shapes)
