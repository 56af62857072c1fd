"""Factors of second moments: whitening and least squares that do not depend on units."""

from __future__ import annotations

import torch
from torch import Tensor

from growkern import ops


def relative_cut(n: int, dtype: torch.dtype) -> float:
    """Eigenvalues of a unit-diagonal (n, n) moment below this are rounding, not data."""
    return n * (1e-14 if dtype == torch.float64 else 1e-8)


class Factor:
    """A factor L of a second moment, a = L Lᵀ on its numerical range.

    The moment is scaled to unit diagonal first, so that units and a column of ones do not matter, and every
    cut-off is relative to that. A Cholesky factor serves wherever the moment is well conditioned; otherwise
    the eigenvectors whose eigenvalues stand above `relative_cut` do. Everything runs in float64.

    Parameters
    ----------
    a : Tensor
        Symmetric positive semi-definite, (n, n).
    diagonal : Tensor, optional
        (n,), what the scaling is taken from; `a`'s own diagonal by default. For a Schur complement: the
        diagonal of the matrix it is a complement in.
    dtype : torch.dtype, optional
        What the moment was accumulated in, which sets the cut-off; `a`'s own by default.

    Attributes
    ----------
    rank, width : int
        Directions that are kept; rows of what `whiten` gives, n with Cholesky, else the rank.
    condition : float
        Largest over smallest kept eigenvalue of the scaled moment (an estimate where Cholesky serves).

    Raises
    ------
    ArithmeticError
        If the eigensolver does not converge.
    """

    def __init__(self, a: Tensor, diagonal: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        n = a.shape[-1]
        cut = relative_cut(n, dtype or a.dtype)
        a = a.double()
        diagonal = a.diagonal() if diagonal is None else diagonal.double()
        alive = diagonal > 0
        self._scale = torch.where(alive, diagonal, 1).rsqrt() * alive  # (n,)
        scaled = a * self._scale * self._scale[:, None]
        self._lower: Tensor | None = None
        lower, info = torch.linalg.cholesky_ex(scaled + torch.diag((~alive).double()))
        if n and not info.any():
            low, high = _extreme_eigenvalues(scaled, lower, alive)
            if low > cut:
                self._lower = lower
                self.rank, self.width = int(alive.sum()), n
                self.condition = high / low if low < float("inf") else 1.0
                return
        w, q = ops.eigh(scaled)
        if w.isnan().any():
            raise ArithmeticError("the eigensolver did not converge on a second moment")
        kept = w > cut
        self.rank = self.width = int(kept.sum())
        self.condition = float(w[-1] / w[kept][0]) if self.rank else 1.0
        self._root = w[kept].sqrt()  # (rank,)
        self._vectors = q[:, kept]  # (n, rank)

    def whiten(self, b: Tensor) -> Tensor:
        """L⁻¹ b for b of shape (..., n, m): (..., width, m)."""
        b = b.double() * self._scale[:, None]
        if self._lower is not None:
            return torch.linalg.solve_triangular(self._lower, b, upper=False)
        return self._vectors.mT @ b / self._root[:, None]

    def unwhiten(self, u: Tensor) -> Tensor:
        """L⁻ᵀ u for u of shape (width, m): (n, m)."""
        if self._lower is not None:
            back = torch.linalg.solve_triangular(self._lower.mT, u, upper=True)
        else:
            back = self._vectors @ (u / self._root[:, None])
        return back * self._scale[:, None]

    def solve(self, b: Tensor) -> Tensor:
        """Give a⁺ b for b of shape (n, m) in the range of a: (n, m)."""
        return self.unwhiten(self.whiten(b))


def whiten_both(target: Tensor, x: Factor | None, v: Factor | None, offsets: int) -> Tensor:
    """Whiten a target (..., p, r·offsets) on the sides that have a factor; v's acts on the r rows of each offset."""
    if x is not None:
        target = x.whiten(target)
    if v is not None:
        target = v.whiten(target.unflatten(-1, (-1, offsets))).flatten(-2)
    return target


def singular(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (m, k), values (k,) descending, right vectors (n, k) of t (m, n), k = min(m, n), by a Gram side."""
    wide = t.shape[0] < t.shape[1]
    t = t.mT if wide else t
    w, v = ops.eigh(t.mT @ t)
    values, v = w.flip(0).clamp_min(0).sqrt(), v.flip(1)
    if values.isnan().any():
        raise ArithmeticError("the eigensolver did not converge on the whitened target")
    u = t @ v / values.clamp_min(torch.finfo(t.dtype).tiny)
    return (v, values, u) if wide else (u, values, v)


def top_singular_value(t: Tensor) -> Tensor:
    """Largest singular value of t (m, n)."""
    gram = t @ t.mT if t.shape[0] < t.shape[1] else t.mT @ t
    return torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt() if len(gram) else gram.new_zeros(())


def _extreme_eigenvalues(a: Tensor, lower: Tensor, alive: Tensor, steps: int = 12) -> tuple[float, float]:
    """Smallest and largest eigenvalue of a on its `alive` columns, by power iteration with a and with a⁻¹."""
    start = torch.arange(len(a), dtype=a.dtype, device=a.device).mul(2.4).cos().mul(alive)[:, None]
    up, down = start, start
    for _ in range(steps):
        up = a @ up
        up = up / up.norm().clamp_min(1e-300)
        down = torch.cholesky_solve(down, lower)
        down = down / down.norm().clamp_min(1e-300)
    high = (up * (a @ up)).sum()
    low = 1 / (down * torch.cholesky_solve(down, lower)).sum()
    low, high = torch.stack([low, high]).tolist()
    return low, high
