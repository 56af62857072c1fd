"""Factors of second moments: whitening and least squares that do not depend on units."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from growkern import ops
from growkern.spectra import (
    BLOCK,
    CONDITION_STEPS,
    SHIFT,
    WIDE,
    dominant,
    extreme_eigenvalues,
    largest_eigenvalue,
    null_space,
    product,
    solved,
    top_singular,
)

LARGEST_PADDED = 256  # wider moments gain nothing from company


def relative_cut(n: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues of a unit-diagonal moment of n features below this are rounding, not data."""
    return n * (1e-14 if dtype == torch.float64 else 1e-8)


class Factor:
    """A factor L of second moments, a = L Lᵀ on their numerical range, for one moment or a batch (..., n, n).

    A moment is scaled to unit diagonal first, so that units and a column of ones do not matter, and every cut-off is
    relative to that. Features whose diagonal is zero are left out. A Cholesky factor serves wherever the moment is
    well conditioned, which `sound` tells, or one wide moment is so beside a small null space, else the eigenvectors
    above `relative_cut` do.
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
        moment_dtype = dtype or a.dtype
        diagonal = (a.diagonal(dim1=-2, dim2=-1) if diagonal is None else diagonal).double()
        alive = diagonal > 0
        cut = relative_cut(alive.sum(-1), moment_dtype)  # (...,)
        scale = torch.where(alive, diagonal, 1).rsqrt() * alive  # (..., n)
        self._lower: Tensor | None = None
        self._null: Tensor | None = None
        if not by_eigenvectors:
            # What Cholesky's method rounds does not depend on units: it takes the moment as it is, but for zeros.
            self._lower, info = _cholesky(a, alive)
            low, high = extreme_eigenvalues(a, self._lower, scale)
            self.sound = (info == 0) & (low > cut)
            self.rank = alive.sum(-1)
            self.condition = torch.where(low < float("inf"), high / low, 1.0)
            # To look is to wait for a GPU; but one wide moment is worth it, and the CPU has nothing to wait for.
            alone = self.sound.numel() == 1 and (not a.is_cuda or a.shape[-1] >= WIDE)
            if not alone or self.sound:
                self._scale = alive.double()
                return
            self._lower = None
        self._scale = scale
        scaled = (a * scale[..., None, :]).mul_(scale[..., :, None])  # in float64, as scale is
        # Where the rank is low, Cholesky's method breaks down about there, and its columns serve.
        if not by_eigenvectors and a.shape[-1] >= WIDE and not 0 < int(info) <= a.shape[-1] // 2:
            if self._leave_out(scaled, alive, cut, high):
                return
        w, self._vectors = dominant(scaled, cut)  # (..., k), (..., n, k)
        kept = w > cut[..., None]
        self.sound = ~w.isnan().any(-1)
        self.rank = kept.sum(-1)
        least = torch.where(kept, w, float("inf")).amin(-1) if w.shape[-1] else w.sum(-1)
        self.condition = torch.where(self.rank > 0, w[..., -1:].sum(-1) / least, 1.0)
        self._inverse_root = torch.where(kept, w, 1).rsqrt() * kept

    def _leave_out(self, scaled: Tensor, alive: Tensor, cut: Tensor, high: Tensor) -> bool:
        """Factor one wide moment by Cholesky's method beside a null space of few directions, if it is such a one."""
        n = scaled.shape[-1]
        square = scaled.view(n, n)
        null = null_space(square, (SHIFT * cut + ~alive).view(n), float(cut))
        if null is None:
            return False
        # P a P + V Vᵀ with P = 1 − V Vᵀ: on the range of P, what is left of a.
        image = square @ null
        half = image - null @ (null.mT @ image + torch.eye(null.shape[-1], dtype=null.dtype, device=null.device)) / 2
        square.addmm_(null, half.mT, alpha=-1).addmm_(half, null.mT, alpha=-1)
        lower, info = _cholesky(scaled, alive)
        start = torch.ones_like(scaled[..., :1])
        low = largest_eigenvalue(lambda b: solved(lower, b), start, CONDITION_STEPS)[..., 0].reciprocal()
        self.sound = (info == 0) & (low > cut)
        if not self.sound:  # a direction was missed
            square.addmm_(null, half.mT).addmm_(half, null.mT)
            return False
        self.rank, self.condition = alive.sum(-1) - null.shape[-1], high / low
        self._lower, self._null = lower, null.view(*scaled.shape[:-1], -1)
        return True

    def _outside(self, b: Tensor) -> Tensor:
        """Project the columns of b away from the null space, where the factor does not leave it out by itself."""
        return b if self._null is None else b - self._null @ (self._null.mT @ b)

    @property
    def width(self) -> int:
        """Columns of L."""
        return (self._lower if self._lower is not None else self._vectors).shape[-1]

    def whiten(self, b: Tensor) -> Tensor:
        """L⁻¹ b for b of shape (..., n, m): (..., width, m)."""
        b = self._outside(b.double() * self._scale[..., None])
        if self._lower is not None:
            return torch.linalg.solve_triangular(self._lower, b, upper=False)
        return self._vectors.mT @ b * self._inverse_root[..., None]

    def unwhiten(self, u: Tensor) -> Tensor:
        """L⁻ᵀ u for u of shape (..., width, m): (..., n, m)."""
        if self._lower is not None:
            back = self._outside(torch.linalg.solve_triangular(self._lower.mT, u, upper=True))
        else:
            back = self._vectors @ (u * self._inverse_root[..., None])
        return back * self._scale[..., None]

    def solve(self, b: Tensor) -> Tensor:
        """Give a⁺ b for b of shape (..., n, m) in the range of a: (..., n, m)."""
        return self.unwhiten(self.whiten(b))


def _cholesky(a: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a moment in float64 in the memory of its copy, with 1 on the diagonal of features that are never seen."""
    lower = a.to(torch.float64, copy=True).mT  # symmetric, by columns as LAPACK has it
    lower.diagonal(dim1=-2, dim2=-1).add_(~alive)
    info = torch.empty(a.shape[:-2], dtype=torch.int32, device=a.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower, info


def times(b: Tensor, a: Tensor) -> Tensor:
    """Give b a in float64 for a moment a (..., n, m) of less, which is never held in float64 as a whole."""
    out = b.new_zeros(*b.shape[:-1], a.shape[-1])
    for start in range(0, a.shape[-2], LARGEST_PADDED):
        rows = slice(start, start + LARGEST_PADDED)
        out += b[..., rows] @ a[..., rows, :].double()
    return out


def least_squares(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Give a⁺ b for the moments a (n, n) and b (n, m) of every site, those of about one size at once.

    Parameters
    ----------
    pairs : mapping of str to (Tensor, Tensor)
        By name of the site.

    Returns
    -------
    dict of str to Tensor
        (n, m) in float64.

    Raises
    ------
    ValueError
        If an eigensolver did not converge; it names the sites.
    """
    together: dict[Hashable, list[str]] = {}
    for name, (a, b) in pairs.items():
        wide = max(b.shape) > LARGEST_PADDED
        together.setdefault(name if wide else (*map(rounded, b.shape), a.dtype, a.device), []).append(name)
    found: dict[str, Tensor] = {}
    groups = list(together.values())
    for by_eigenvectors in (False, True):
        solved, flags = [], []
        for names in groups:
            factor = Factor(padded([pairs[name][0] for name in names]), by_eigenvectors=by_eigenvectors)
            solved.append(factor.solve(padded([pairs[name][1] for name in names])))
            flags.append(factor.sound)
        sound = torch.cat([each.to(flags[0].device) for each in flags]).tolist() if flags else []
        for names, all_of_them in zip(groups, solved, strict=True):
            for name, one in zip(names, all_of_them, strict=True):
                if sound.pop(0):
                    rows, columns = pairs[name][1].shape
                    found[name] = one[:rows, :columns].clone() if len(names) > 1 else one
        groups = [left for names in groups if (left := [name for name in names if name not in found])]
    if groups:
        sites = ", ".join(repr(name) for names in groups for name in names)
        raise ValueError(f"the eigensolver did not converge on a second moment of site {sites}")
    return found


def rounded(n: int) -> int:
    """Round up to 8, 12, 16, 24, 32, 48, 64 and so on."""
    power = max(8, 1 << (n - 1).bit_length())
    return power * 3 // 4 if n <= power * 3 // 4 and power > 8 else power


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors, filled up with zeros to one size."""
    if all(each.shape == tensors[0].shape for each in tensors):
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]
    shape = [max(sizes) for sizes in zip(*(each.shape for each in tensors), strict=True)]
    out = tensors[0].new_zeros(len(tensors), *shape)
    for row, each in zip(out, tensors, strict=True):
        row[tuple(map(slice, each.shape))] = each
    return out


def by_row(each: Callable[[Tensor], Tensor], b: Tensor, offsets: int) -> Tensor:
    """Apply a map of r rows to those of every offset of b (..., r·offsets, m), which run together."""
    rows = each(b.unflatten(-2, (-1, offsets)).flatten(-2))
    return rows.unflatten(-1, (offsets, b.shape[-1])).flatten(-3, -2)


class Whitened:
    """T = L⁻¹ N M⁻ᵀ for targets N (..., p, r·offsets), whole only where it must be: to apply it costs much less.

    Parameters
    ----------
    target : Tensor
        N.
    x, v : Factor or None
        Of the moments of x and v that whiten its sides, L and M; v's acts on the r rows of each offset.
    offsets : int
        Columns of N for each output.
    """

    def __init__(self, target: Tensor, x: Factor | None = None, v: Factor | None = None, offsets: int = 1) -> None:
        self._target, self._x, self._v, self._offsets = target, x, v, offsets
        rows = target.shape[-2] if x is None else x.width
        columns = target.shape[-1] if v is None else v.width * offsets
        self.shape = (*target.shape[:-2], rows, columns)

    @cached_property
    def matrix(self) -> Tensor:
        """T itself, of shape `shape`."""
        t = self._target if self._x is None else self._x.whiten(self._target)
        if self._v is None:
            return t
        rows = t.unflatten(-1, (-1, self._offsets)).transpose(-3, -2)  # (..., r, width, offsets)
        whitened = self._v.whiten(rows.flatten(-2)).unflatten(-1, rows.shape[-2:])
        return whitened.transpose(-3, -2).flatten(-2)

    def times(self, b: Tensor) -> Tensor:
        """T b for b of a few columns."""
        if "matrix" in vars(self):
            return product(self.matrix, b)
        b = b if self._v is None else by_row(self._v.unwhiten, b, self._offsets)
        left = product(self._target, b)
        return left if self._x is None else self._x.whiten(left)

    def back(self, u: Tensor) -> Tensor:
        """Tᵀ u for u of a few columns."""
        if "matrix" in vars(self):
            return product(self.matrix.mT, u)
        right = product(self._target.mT, u if self._x is None else self._x.unwhiten(u))
        return right if self._v is None else by_row(self._v.whiten, right, self._offsets)

    def singular(self, most: int, above: Tensor | None) -> tuple[Tensor, Tensor]:
        """Singular values (..., k), descending, and vectors (..., s, k) of the smaller side s, the right one if equal.

        Parameters
        ----------
        most : int
            How many are wanted at most.
        above : Tensor or None
            (...,) size below which none is wanted.

        Returns
        -------
        values, vectors : Tensor
            All values, or of a wide matrix perhaps only those that are wanted, with at least their vectors. NaN where
            the eigenproblem of the Gram side did not converge.
        """
        *lead, rows, columns = self.shape
        alone, narrow = all(n == 1 for n in lead), min(rows, columns)
        if alone and narrow >= WIDE and (above is not None or most <= narrow // 32):
            found = self._few(most, float(above or 0))
            if found is not None:
                return found
        side = self.matrix if rows < columns else self.matrix.mT  # (..., s, l)
        w, vectors = ops.eigh(side @ side.mT)
        return w.flip(-1).clamp_min(0).sqrt(), vectors[..., max(narrow - most, 0) :].flip(-1)

    def _few(self, most: int, above: float) -> tuple[Tensor, Tensor] | None:
        """Do what `singular` does by block Lanczos; None where that would not pay."""
        first, second = (self.back, self.times) if self.shape[-2] < self.shape[-1] else (self.times, self.back)
        *lead, longer = *self.shape[:-2], max(self.shape[-2:])
        places = torch.arange(longer * BLOCK, dtype=self._target.dtype, device=self._target.device)
        start = second(places.square().mul(0.7).cos().view(*lead, longer, BLOCK))  # half a step nearer than at random
        return top_singular(lambda b: second(first(b)), start, most, above)

    def both_sides(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Left (..., m, k) and right vectors (..., n, k), given those of the smaller side as `singular` does."""
        wide = self.shape[-2] < self.shape[-1]
        others = (self.back if wide else self.times)(vectors)
        others = others / values.clamp_min(torch.finfo(values.dtype).tiny)[..., None, :]
        return (vectors, others) if wide else (others, vectors)
