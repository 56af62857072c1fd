"""gromo's updates from its statistics: Cholesky factors in float64 for inverse roots, a Gram side for singular vectors.

α and ω are the same with any factor of S (and of the gradient covariance E), up to the sign of each neuron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from growkern import ops
from growkern.gromo.statistics import NotCovered, need
from growkern.spectra import WIDE, largest_eigenvalue
from growkern.whitening import Whitened

__all__ = ["added_parameters", "delta"]

_DTYPES = (torch.float32, torch.float64)
# A Gram side squares: singular values below this share of the largest are left to a decomposition of the matrix.
_GRAM = 1e-6
# Lanczos' steps for the smallest eigenvalue, which they find from above, and how far below it a threshold is clear.
_STEPS, _CLEAR = 4, 0.1


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
    m = m.double()
    solved = torch.cholesky_solve(m, _positive(s)).mT
    if e is not None:
        solved = torch.cholesky_solve(solved, _positive(e))
    decrease = (solved * m.mT).sum()
    need(bool(torch.isfinite(solved).all()) and bool(decrease >= 0))
    return solved.to(s.dtype), decrease.to(s.dtype)


@dataclass
class Root:
    """A factor L⁻¹ of the inverse of a matrix, (LLᵀ)⁻¹ = L⁻ᵀ L⁻¹.

    Attributes
    ----------
    whiten, unwhiten : Callable
        b ↦ L⁻¹ b and u ↦ L⁻ᵀ u.
    width : int
        Rows of L⁻¹.
    """

    whiten: Callable[[Tensor], Tensor]
    unwhiten: Callable[[Tensor], Tensor]
    width: int


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
    left, right = _root(s, numerical_threshold), _root(e, e_threshold)
    target, by_x = n.double(), left
    if left is not None and len(n) >= 2 * n.shape[1]:  # a narrow T costs less to make than to apply in parts
        target, by_x = left.whiten(target), None
    whitened = Whitened(target, by_x, right)
    rows, columns = whitened.shape
    need(rows * columns > 0)
    exact = n.dtype == torch.float64
    if not exact:
        wanted = min(rows, columns) if maximum_added_neurons is None else max(1, maximum_added_neurons)
        values, vectors = whitened.singular(wanted, None)
        need(bool(torch.isfinite(values).all()))
        count = _significant(values, statistical_threshold, maximum_added_neurons)
        u, v = whitened.both_sides(values[:count], vectors[:, :count])
        exact = not values[0] or bool(count and values[count - 1] < _GRAM * values[0])
    if exact:
        u, values, vh = ops.svd(whitened.matrix)
        need(bool(torch.isfinite(values).all()))
        v, count = vh.mT, _significant(values, statistical_threshold, maximum_added_neurons)
    # Where eigenvalues were dropped, gromo has singular values of zero besides.
    need(min(rows, columns) == min(n.shape) or min(statistical_threshold, float(values[0])) > 0)
    u, values, v = u[:, :count], values[:count], v[:, :count]
    scale = torch.ones_like(values) if ignore_singular_values else values.sqrt()
    alpha = (u if left is None else left.unwhiten(u)) * scale
    omega = (v if right is None else right.unwhiten(v)) * scale
    need(bool(torch.isfinite(alpha).all() and torch.isfinite(omega).all()))
    return alpha.mT.to(n.dtype), omega.to(n.dtype), values.to(n.dtype)


def _significant(values: Tensor, threshold: float, most: int | None) -> int:
    count = int((values >= min(threshold, float(values[0]))).sum())
    return count if most is None else min(count, most)


def _root(matrix: Tensor | None, threshold: float) -> Root | None:
    """Factor a matrix; its eigenvalues up to `threshold` have no inverse. None for the identity."""
    if matrix is None:
        return None
    alive = matrix.diagonal() > 0  # the rows of a dead unit are zero
    dead = None if bool(alive.all()) else ~alive
    lower = _cholesky(matrix, dead)
    if lower is not None and (threshold <= 0 or _all_above(threshold, lower, matrix, dead)):
        return _triangular(lower, dead)
    lower = None  # its memory is wanted
    w, q = ops.eigh(matrix)  # in the precision of gromo, so that about the same eigenvalues are kept
    need(not bool(w.isnan().any()))
    kept = w > threshold
    inverse = (q[:, kept] / w[kept].sqrt()).double()  # (p, rank)
    return Root(lambda b: inverse.mT @ b, lambda u: inverse @ u, inverse.shape[1])


def _triangular(lower: Tensor, dead: Tensor | None) -> Root:
    seen = None if dead is None else (~dead).double()[:, None]  # (p, 1)

    def whiten(b: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(lower, b if seen is None else b * seen, upper=False)

    def unwhiten(u: Tensor) -> Tensor:
        back = torch.linalg.solve_triangular(lower.mT, u, upper=True)
        return back if seen is None else back * seen

    return Root(whiten, unwhiten, len(lower))


def _all_above(threshold: float, lower: Tensor, matrix: Tensor, dead: Tensor | None) -> bool:
    """Whether all eigenvalues of a matrix with the Cholesky factor `lower` are; a clear answer costs a few steps."""
    if len(lower) >= WIDE:
        start = torch.arange(len(lower), dtype=lower.dtype, device=lower.device).mul(2.4).cos()[:, None]

        def inverse(b: Tensor) -> Tensor:
            half = torch.linalg.solve_triangular(lower, b, upper=False)
            return torch.linalg.solve_triangular(lower.mT, half, upper=True)

        if float(largest_eigenvalue(inverse, start, _STEPS)) * threshold < _CLEAR:
            return True
    return _cholesky(matrix, dead, threshold) is not None


def _positive(matrix: Tensor) -> Tensor:
    """Cholesky factor in float64 of a matrix that is positive definite."""
    lower = _cholesky(matrix)
    if lower is None:
        raise NotCovered
    return lower


def _cholesky(matrix: Tensor, dead: Tensor | None = None, less: float = 0.0) -> Tensor | None:
    """Factor a symmetric matrix less a multiple of the identity in float64; None if it is not positive definite."""
    # In the place of the one copy that is made of it; dead rows become those of the identity.
    lower = matrix.to(torch.float64, copy=True).mT  # columns first, as LAPACK has them
    if less:
        lower.diagonal().sub_(less)
    if dead is not None:
        lower.diagonal()[dead] = 1
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return None if info else lower


def _check(other: Tensor, dtype: torch.dtype, *symmetric: Tensor) -> None:
    """Leave to gromo what it refuses, warns about or differentiates through."""
    tensors = (other, *symmetric)
    need(dtype in _DTYPES and all(each.dtype in _DTYPES and each.device == other.device for each in tensors))
    need(not any(each.requires_grad for each in tensors) and other.ndim == 2)
    for each in symmetric:
        need(each.ndim == 2 and each.shape[0] == each.shape[1])
        need(torch.equal(each, each.mT) or torch.allclose(each, each.mT))
