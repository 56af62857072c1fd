"""Factors of second moments: whitening and least squares that do not depend on units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from growkern import ops


def relative_cut(n: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues of a unit-diagonal moment of n features below this are rounding, not data."""
    return n * (1e-14 if dtype == torch.float64 else 1e-8)


WIDE = 512  # rows of a matrix, from which on a few singular values cost less by Lanczos' method


class Factor:
    """A factor L of second moments, a = L Lᵀ on their numerical range, for one moment or a batch (..., n, n).

    A moment is scaled to unit diagonal first, so that units and a column of ones do not matter, and every cut-off is
    relative to that. Features whose diagonal is zero are left out. A Cholesky factor serves wherever the moment is
    well conditioned, which `sound` tells, else the eigenvectors above `relative_cut` do.
    Everything runs in float64, and nothing waits for a GPU but one wide moment.

    Parameters
    ----------
    a : Tensor
        Symmetric positive semi-definite, (..., n, n).
    diagonal : Tensor, optional
        (..., n), what the scaling is taken from; `a`'s own diagonal by default. For a Schur complement: the
        diagonal of the matrix it is a complement in.
    dtype : torch.dtype, optional
        What the moment was accumulated in, which sets the cut-off; `a`'s own by default.
    by_eigenvectors : bool
        Factor by eigenvectors, whatever the condition.

    Attributes
    ----------
    sound : Tensor
        (...,) whether the factor serves.
    rank, condition : Tensor
        (...,) directions that are kept; largest over smallest kept eigenvalue of the scaled moment (an estimate with
        Cholesky).
    """

    def __init__(
        self,
        a: Tensor,
        diagonal: Tensor | None = None,
        dtype: torch.dtype | None = None,
        by_eigenvectors: bool = False,
    ) -> None:
        moment_dtype, a = dtype or a.dtype, a.double()
        diagonal = a.diagonal(dim1=-2, dim2=-1) if diagonal is None else diagonal.double()
        alive = diagonal > 0
        cut = relative_cut(alive.sum(-1), moment_dtype)  # (...,)
        self._scale = torch.where(alive, diagonal, 1).rsqrt() * alive  # (..., n)
        scaled = a * self._scale[..., None, :] * self._scale[..., :, None]
        self._lower: Tensor | None = None
        if not by_eigenvectors:
            self._lower, info = torch.linalg.cholesky_ex(scaled + torch.diag_embed((~alive).double()))
            low, high = _extreme_eigenvalues(scaled, self._lower, alive)
            self.sound = (info == 0) & (low > cut)
            self.rank = alive.sum(-1)
            self.condition = torch.where(low < float("inf"), high / low, 1.0)
            # To look is to wait for a GPU; but one wide moment is worth it, and the CPU has nothing to wait for.
            alone = self.sound.numel() == 1 and (not a.is_cuda or a.shape[-1] >= WIDE)
            if not alone or self.sound:
                return
            self._lower = None
        w, self._vectors = _range(scaled, cut)  # (..., k), (..., n, k)
        kept = w > cut[..., None]
        self.sound = ~w.isnan().any(-1)
        self.rank = kept.sum(-1)
        least = torch.where(kept, w, float("inf")).amin(-1) if w.shape[-1] else w.sum(-1)
        self.condition = torch.where(self.rank > 0, w[..., -1:].sum(-1) / least, 1.0)
        self._inverse_root = torch.where(kept, w, 1).rsqrt() * kept

    def whiten(self, b: Tensor) -> Tensor:
        """L⁻¹ b for b of shape (..., n, m): (..., width, m)."""
        b = b.double() * self._scale[..., None]
        if self._lower is not None:
            return torch.linalg.solve_triangular(self._lower, b, upper=False)
        return self._vectors.mT @ b * self._inverse_root[..., None]

    def unwhiten(self, u: Tensor) -> Tensor:
        """L⁻ᵀ u for u of shape (..., width, m): (..., n, m)."""
        if self._lower is not None:
            back = torch.linalg.solve_triangular(self._lower.mT, u, upper=True)
        else:
            back = self._vectors @ (u * self._inverse_root[..., None])
        return back * self._scale[..., None]

    def solve(self, b: Tensor) -> Tensor:
        """Give a⁺ b for b of shape (..., n, m) in the range of a: (..., n, m)."""
        return self.unwhiten(self.whiten(b))


def factor(a: Tensor) -> Factor:
    """Factor a moment (n, n) by Cholesky where that serves, else by eigenvectors; see `Factor`."""
    found = Factor(a)
    if not found.sound:
        found = Factor(a, by_eigenvectors=True)
        if not found.sound:
            raise ArithmeticError("the eigensolver did not converge on a second moment")
    return found


def whiten_both(target: Tensor, x: Factor | None, v: Factor | None, offsets: int) -> Tensor:
    """Whiten targets (..., p, r·offsets) on the sides that have a factor; v's acts on the r rows of each offset."""
    if x is not None:
        target = x.whiten(target)
    if v is not None:
        by_row = target.unflatten(-1, (-1, offsets)).transpose(-3, -2)  # (..., r, p, offsets)
        rows, (p, _) = v.whiten(by_row.flatten(-2)), by_row.shape[-2:]
        target = rows.unflatten(-1, (p, offsets)).transpose(-3, -2).flatten(-2)
    return target


def singular(t: Tensor, most: int, above: Tensor | None) -> tuple[Tensor, Tensor]:
    """Singular values (..., k), descending, and vectors (..., s, k) of the smaller side s of t (..., m, n).

    Parameters
    ----------
    t : Tensor
        (..., m, n).
    most : int
        How many are wanted at most.
    above : Tensor or None
        (...,) size below which none is wanted.

    Returns
    -------
    values, vectors : Tensor
        All min(m, n) of them, or of a wide matrix perhaps only those that are wanted. NaN where the eigenproblem of
        the Gram side did not converge.
    """
    side = t if t.shape[-2] < t.shape[-1] else t.mT  # (..., s, l)
    if side.shape[:-2].numel() == 1 and side.shape[-2] >= WIDE:
        found = _top(side.view(side.shape[-2:]), most, float(above or 0))
        if found is not None:
            return found[0].view(*t.shape[:-2], -1), found[1].view(*t.shape[:-2], side.shape[-2], -1)
    w, vectors = ops.eigh(side @ side.mT)
    return w.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)


def both_sides(t: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Left (..., m, k) and right vectors (..., n, k) of t (..., m, n), given those of its smaller side."""
    wide = t.shape[-2] < t.shape[-1]
    others = (t.mT if wide else t) @ vectors / values.clamp_min(torch.finfo(t.dtype).tiny)[..., None, :]
    return (vectors, others) if wide else (others, vectors)


def _top(side: Tensor, most: int, above: float, block: int = 16) -> tuple[Tensor, Tensor] | None:
    """Largest singular values of side (s, l) and their left vectors, by block Lanczos; None if that would not pay."""
    s = len(side)
    if not above and most > s // 32:
        return None
    places = torch.arange(s * block, dtype=side.dtype, device=side.device).view(s, block)
    fresh = torch.linalg.qr(places.square().mul(0.7).cos())[0]
    basis, projected, before = side.new_zeros(s, 0), side.new_zeros(0, 0), 1.0
    while basis.shape[1] < s // 3:
        basis = torch.cat([basis, fresh], 1)
        image = side @ (side.mT @ fresh)
        along = basis.mT @ image
        image = image - basis @ along
        fresh, rest = torch.linalg.qr(image - basis @ (basis.mT @ image))
        projected = torch.cat([torch.nn.functional.pad(projected, (0, 0, 0, block)), along], 1).triu()
        if basis.shape[1] % (4 * block):
            continue
        w, vectors = ops.eigh(projected.mT)  # of which the lower triangle counts
        w, vectors = w.flip(0), vectors.flip(1)
        residuals = (rest @ vectors[-block:]).norm(dim=0)
        count = min(most, int((w > above**2).sum()))
        if count > len(w) // 2:
            return None
        others_below = count == most or bool(w[count] + residuals[count] <= above**2)
        worst = float(residuals[:count].max() / w[0]) if count else 0.0
        if others_below and worst <= 1e-10:
            return w[:count].sqrt(), basis @ vectors[:, :count]
        left = (s // 3 - basis.shape[1]) / (4 * block)
        if worst * (worst / before) ** left > 1e-10:  # in a bulk of noise it converges too slowly to pay
            return None
        before = worst or before
    return None


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Largest eigenvalue (..., d) of symmetric operators on the columns of (..., n, d), by steps of Lanczos' method."""
    basis = start.new_zeros(*start.shape, 0)  # (..., n, d, steps so far)
    rows: list[Tensor] = []
    for step in range(steps):
        length = start.norm(dim=-2, keepdim=True)
        gone = length <= 1e-13 * (rows[0].abs().sum(-1)[..., None, :] if rows else 0)  # the space is exhausted
        basis = torch.cat([basis, torch.where(gone, 0, start / torch.where(gone, 1, length))[..., None]], -1)
        start = apply(basis[..., -1])
        for again in (False, True):  # twice, or the basis would not stay orthogonal
            along = torch.einsum("...ndk,...nd->...dk", basis, start)
            start = start - torch.einsum("...ndk,...dk->...nd", basis, along)
            if not again:
                rows.append(torch.nn.functional.pad(along, (0, steps - step - 1)))
    projected = torch.stack(rows, -2)  # (..., d, steps, steps), of which the lower triangle counts
    return ops.eigh(projected)[0][..., -1]


def _range(a: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a (..., n, n), at least all that stand above `cut` (...,)."""
    # Few samples leave a wide moment few directions: a subspace that is a little larger then holds all of them, found
    # by iterating on it, at a fraction of the cost of a full decomposition.
    n = a.shape[-1]
    size = 128
    while a.shape[:-2].numel() == 1 and 4 * size <= n:
        places = torch.arange(n * size, dtype=a.dtype, device=a.device).view(n, size)
        basis, triangle = torch.linalg.qr(a.view(n, n) @ places.square().mul(0.7).cos())
        size *= 2
        if triangle.diagonal().abs().min() > cut * n**0.5:  # all of it counts: more does
            continue
        for _ in range(2):
            basis = torch.linalg.qr(a.view(n, n) @ basis)[0]
        w, vectors = ops.eigh(basis.mT @ (a.view(n, n) @ basis))
        if w[0] < 0.01 * cut:  # it reaches beyond what counts, so that nothing that does is outside
            return w.view(*a.shape[:-2], -1), (basis @ vectors).view(*a.shape[:-1], -1)
    return ops.eigh(a)


def _extreme_eigenvalues(a: Tensor, lower: Tensor, alive: Tensor, steps: int = 12) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue of a on its `alive` columns, by power iteration with a and with a⁻¹."""

    def inverse(b: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(lower, b, upper=False)  # cholesky_solve copies the factor of a batch
        return torch.linalg.solve_triangular(lower.mT, half, upper=True)

    start = torch.arange(a.shape[-1], dtype=a.dtype, device=a.device).mul(2.4).cos()
    up = down = (start * alive)[..., None]
    for _ in range(steps):
        up = a @ up
        up = up / up.norm(dim=-2, keepdim=True).clamp_min(1e-300)
        down = inverse(down)
        down = down / down.norm(dim=-2, keepdim=True).clamp_min(1e-300)
    high = (up * (a @ up)).sum((-2, -1))
    low = 1 / (down * inverse(down)).sum((-2, -1))
    return low, high
