"""gromo's updates from its statistics: Cholesky factors in float64 for inverse roots, a Gram side for singular vectors.

α and ω are the same with any factor of S (and of the gradient covariance E), up to the sign of each neuron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from growkern import ops
from growkern.gromo.statistics import need
from growkern.whitening import Whitened

__all__ = ["added_parameters", "delta"]

_DTYPES = (torch.float32, torch.float64)
# A Gram side squares: singular values below this share of the largest are left to a decomposition of the matrix.
_GRAM = 1e-6


def delta(s: Tensor, m: Tensor, dtype: torch.dtype, e: Tensor | None) -> tuple[Tensor, Tensor]:
    """Solve for the best change of existing weights, (S⁻¹ M E⁻¹)ᵀ.

    Parameters
    ----------
    s, m : Tensor
        (q, q) and (q, r), of one dtype.
    dtype : torch.dtype
        The precision that gromo was asked for.
    e : Tensor or None
        Covariance of the gradients (r, r).

    Returns
    -------
    tuple of Tensor
        The change (r, q) and the decrease that it promises, in the dtype of S.

    Raises
    ------
    NotCovered
        If a matrix is not symmetric and positive definite, or gromo would warn.
    """
    _check(m, dtype, *[each for each in (s, e) if each is not None])
    need(s.dtype == m.dtype and len(s) == len(m) and (e is None or len(e) == m.shape[1]))
    solved = torch.cholesky_solve(m.double(), _cholesky(s.double())).mT
    if e is not None:
        solved = torch.cholesky_solve(solved, _cholesky(e.double()))
    decrease = torch.trace(solved @ m.double())
    need(bool(torch.isfinite(solved).all()) and bool(decrease >= 0))
    return solved.to(s.dtype), decrease.to(s.dtype)


@dataclass
class Root:
    """A factor L⁻¹ of the inverse of a matrix, (LLᵀ)⁻¹ = L⁻ᵀ L⁻¹.

    Attributes
    ----------
    whiten, unwhiten : Callable
        b ↦ L⁻¹ b and u ↦ L⁻ᵀ u.
    """

    whiten: Callable[[Tensor], Tensor]
    unwhiten: Callable[[Tensor], Tensor]


def added_parameters(
    s: Tensor | None,
    n: Tensor,
    numerical_threshold: float,
    statistical_threshold: float,
    maximum_added_neurons: int | None,
    ignore_singular_values: bool,
    e: Tensor | None,
    e_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve for the neurons that TINY adds, from the singular vectors of S^-1/2 N E^-1/2.

    Parameters
    ----------
    s : Tensor or None
        (p, p); None for the identity.
    n : Tensor
        (p, r).
    numerical_threshold, e_threshold : float
        Eigenvalues of S and of E up to this count as zero.
    statistical_threshold : float
        Singular values below this are dropped, unless all are.
    maximum_added_neurons : int or None
        How many at most.
    ignore_singular_values : bool
        Take singular vectors as they are.
    e : Tensor or None
        Covariance of the gradients (r, r); None for the identity.

    Returns
    -------
    tuple of Tensor
        α (k, p), ω (r, k) and the singular values (k,), in the dtype of N.

    Raises
    ------
    NotCovered
        If a matrix is not symmetric or not finite, or gromo would raise.
    """
    _check(n, n.dtype, *[each for each in (s, e) if each is not None])
    need((s is None or len(s) == len(n)) and (e is None or len(e) == n.shape[1]))
    need(n.numel() > 0 and (maximum_added_neurons is None or maximum_added_neurons >= 0))
    left = _root(s, numerical_threshold)
    right = _root(e, e_threshold)
    target = right.whiten(left.whiten(n.double()).mT).mT
    need(target.numel() > 0 and bool(torch.isfinite(target).all()))
    whitened = Whitened(target)
    values, vectors = whitened.singular(min(target.shape), None)
    need(not bool(values.isnan().any()))
    # Where eigenvalues were dropped, gromo has singular values of zero besides.
    need(len(values) == min(n.shape) or min(statistical_threshold, float(values[0])) > 0)
    count = _significant(values, statistical_threshold, maximum_added_neurons)
    u, v = whitened.both_sides(values[:count], vectors[:, :count])
    if n.dtype == torch.float64 or not values[0] or (count and values[count - 1] < _GRAM * values[0]):
        u, values, vh = ops.svd(target)
        need(not bool(values.isnan().any()))
        v, count = vh.mT, _significant(values, statistical_threshold, maximum_added_neurons)
    u, values, v = u[:, :count], values[:count], v[:, :count]
    scale = torch.ones_like(values) if ignore_singular_values else values.sqrt()
    alpha, omega = left.unwhiten(u) * scale, right.unwhiten(v) * scale
    return alpha.mT.to(n.dtype), omega.to(n.dtype), values.to(n.dtype)


def _significant(values: Tensor, threshold: float, most: int | None) -> int:
    count = int((values >= min(threshold, float(values[0]))).sum())
    return count if most is None else min(count, most)


def _root(matrix: Tensor | None, threshold: float) -> Root:
    """Factor a matrix; its eigenvalues up to `threshold` have no inverse."""
    if matrix is None:
        return Root(lambda b: b, lambda u: u)
    alive = (matrix.diagonal() > 0).double()[:, None]  # (p, 1); the rows of a dead unit are zero
    filled = matrix.double() + torch.diag((1 + abs(threshold)) * (1 - alive[:, 0]))
    _, info = torch.linalg.cholesky_ex(filled - threshold * torch.eye(len(matrix), device=matrix.device))
    if not info:  # no other eigenvalue is that small
        lower = _cholesky(filled)
        return Root(
            lambda b: torch.linalg.solve_triangular(lower, b * alive, upper=False),
            lambda u: torch.linalg.solve_triangular(lower.mT, u, upper=True) * alive,
        )
    w, q = ops.eigh(matrix)  # in the precision of gromo, so that about the same eigenvalues are kept
    need(not bool(w.isnan().any()))
    kept = w > threshold
    inverse = (q[:, kept] / w[kept].sqrt()).double()  # (p, rank)
    return Root(lambda b: inverse.mT @ b, lambda u: inverse @ u)


def _cholesky(matrix: Tensor) -> Tensor:
    lower, info = torch.linalg.cholesky_ex(matrix)
    need(not info)
    return lower


def _check(other: Tensor, dtype: torch.dtype, *symmetric: Tensor) -> None:
    """Leave to gromo what it refuses, warns about or differentiates through."""
    tensors = (other, *symmetric)
    need(dtype in _DTYPES and all(each.dtype in _DTYPES and each.device == other.device for each in tensors))
    need(not any(each.requires_grad for each in tensors) and other.ndim == 2)
    for each in symmetric:
        need(each.ndim == 2 and each.shape[0] == each.shape[1])
        need(torch.equal(each, each.mT) or torch.allclose(each, each.mT))
