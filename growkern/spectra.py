"""Parts of spectra, where a full decomposition would cost more: tops, extremes, and what stands above a cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from growkern import ops

_RESIDUAL = 5e-9  # of TᵀT, relative to the geometric mean of the wanted eigenvalue and the largest
_VECTORS = 4  # of a basis, at least, for each singular value that it has to find
_PIVOTS = 64  # features that a step of Cholesky's method takes at once
_PATIENCE = 2**14  # over the square of a matrix's rows: vectors before slow convergence counts
_CONDITION_STEPS = 4  # of Lanczos' method: conditions from 0.6 of the true ones on, from 0.95 near singular moments
BLOCK = 16  # columns of a step of block Lanczos
WIDE = 512  # rows of a matrix, from which on a few singular values cost less by Lanczos' method


def product(a: Tensor, b: Tensor) -> Tensor:
    """Give a b for b (..., n, k) of few columns; on a CPU its transpose costs a third of the time."""
    return (b.mT @ a.mT).mT


def top_singular(
    square: Callable[[Tensor], Tensor], start: Tensor, most: int, above: float
) -> tuple[Tensor, Tensor] | None:
    """Largest singular values (..., k) of one matrix and vectors (..., s, k) of its smaller side, by block Lanczos.

    Parameters
    ----------
    square : callable
        Multiplies a few columns (..., s, m) by the matrix and its transpose.
    start : Tensor
        The columns (..., s, block) to start from, as many as a step takes.
    most : int
        How many are wanted at most.
    above : float
        Size below which none is wanted.

    Returns
    -------
    tuple of Tensor, or None
        None where this would not pay: many are wanted, or they converge slowly.
    """
    *lead, s, block = start.shape
    fresh, steps, look, before = torch.linalg.qr(start.view(s, block))[0].mT, 0, 2, (0, 1.0)
    basis, projected = fresh[:0], fresh.new_zeros(0, 0)  # vectors in rows: products are faster narrow side first
    while len(basis) < s // 3:
        basis = torch.cat([basis, fresh])
        image = square(fresh.mT.view(start.shape)).view(s, block).mT
        along = image @ basis.mT
        image = torch.addmm(image, along, basis, alpha=-1)
        fresh, rest = torch.linalg.qr(torch.addmm(image, image @ basis.mT, basis, alpha=-1).mT)
        fresh = fresh.mT
        projected = torch.cat([torch.nn.functional.pad(projected, (0, block)), along])
        steps += 1
        if steps < look:  # to look takes time too
            continue
        look = max(steps + (2 if steps == 2 else 1), steps * 5 // 4)
        values, vectors = ops.eigh(projected)  # of which the lower triangle counts
        values, vectors = values.flip(0), vectors.flip(1)
        beyond = rest @ vectors[-block:]  # TᵀT basis vectors = basis vectors w + fresh beyond
        w, residuals = torch.stack([values, beyond.norm(dim=0)]).tolist()
        count = min(most, sum(each > above**2 for each in w))
        if _VECTORS * count > s // 3:
            return None
        if count == len(w):
            continue
        if any(w[i - block + 1] - w[i] <= 1e-6 * w[0] for i in range(block - 1, count)):
            return None  # a block finds as many equal values as it has columns, and there may be more
        others_below = count == most or w[count] + residuals[count] <= above**2
        # An eigenvalue is no further off than its residual, so that λ is within 1e-4 down to 2.5e-5 of the largest.
        worst = max((r / math.sqrt(each * w[0]) for r, each in zip(residuals[:count], w, strict=False)), default=0.0)
        if others_below and worst <= _RESIDUAL:
            found = vectors[:, :count].mT @ basis + (beyond[:, :count] / values[:count]).mT @ fresh  # one power further
            return values[:count].sqrt().view(*lead, -1), found.mT.view(*lead, s, -1)
        rate = (worst / before[1]) ** (1 / (steps - before[0]))
        left = s // 3 // block - steps
        # In a bulk of noise it is too slow to pay; but beyond caches a whole decomposition costs much more.
        if len(w) >= max(4 * block, s**2 // _PATIENCE) and worst * rate**left > _RESIDUAL:
            return None
        before = steps, worst or 1.0
    return None


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int, settle: bool = False) -> Tensor:
    """Largest eigenvalue of symmetric operators on the columns of a tensor, by Lanczos' method.

    Parameters
    ----------
    apply : callable
        Takes (..., n, d) to (..., n, d), each column by an operator of its own.
    start : Tensor
        (..., n, d).
    steps : int
        How many at most.
    settle : bool
        Stop where two more steps have changed none by more than 1e-5 of it; this looks at the values.

    Returns
    -------
    Tensor
        (..., d).
    """
    basis, before = start.new_zeros(*start.shape, 0), None  # (..., n, d, steps so far)
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
        if step + 1 < steps and not (settle and step >= 5 and step % 2):
            continue
        projected = torch.stack(rows, -2)[..., : step + 1]  # (..., d, k, k), of which the lower triangle counts
        largest = ops.eigh(projected)[0][..., -1]
        if step + 1 == steps or (before is not None and bool(((largest - before).abs() <= 1e-5 * largest).all())):
            break
        before = largest
    return largest


def dominant(a: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a (..., n, n), at least all that stand above `cut` (...,)."""
    n, lead = a.shape[-1], a.shape[:-2]
    found = _of_columns(a.view(n, n), cut) if n >= WIDE and lead.numel() == 1 else None
    return ops.eigh(a) if found is None else (found[0].view(*lead, -1), found[1].view(*lead, n, -1))


def _of_columns(a: Tensor, cut: Tensor) -> tuple[Tensor, Tensor] | None:
    """Do what `dominant` does where up to n / 2 columns hold all of it, as with few samples; else None."""
    # Cholesky's method finds such columns, those of the features with most left. They multiply what a was rounded by,
    # so that only their span serves.
    n = len(a)
    columns, left = a[:, :0], a.diagonal().clone()
    while True:
        most, pivots = left.topk(_PIVOTS)
        if most[0] <= 0.1 * cut:
            break
        fresh = a[pivots].mT - columns @ columns[pivots].mT
        w, vectors = ops.eigh(fresh[pivots])
        apart = w > 0.01 * most[0]  # of features that are alike, some wait for another turn
        if columns.shape[1] > n // 2 - _PIVOTS or not apart.any():  # which NaN is not
            return None
        fresh = fresh @ (vectors[:, apart] * w[apart].rsqrt())
        columns = torch.cat([columns, fresh], 1)
        left -= fresh.square().sum(1)
    for _ in range(4):
        basis = torch.linalg.qr(columns)[0]
        columns = a @ basis
        w, vectors = ops.eigh(basis.mT @ columns)
        kept = w > cut
        beyond = _outside(basis, columns @ (vectors[:, kept] / w[kept]))  # which one more product adds
        if float(beyond.norm()) <= 1e-4:
            break
    else:
        return None
    missed = largest_eigenvalue(lambda b: _outside(basis, a @ _outside(basis, b)), torch.ones_like(a[:, :1]), 8)
    if missed[0] > 0.5 * cut:  # little of each feature may be much of a direction
        return None
    return w[kept], beyond.addmm_(basis, vectors[:, kept])


def _outside(basis: Tensor, b: Tensor) -> Tensor:
    """Project the columns of b away from the span of an orthonormal basis."""
    return b - basis @ (basis.mT @ b)


def extreme_eigenvalues(a: Tensor, lower: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue of S a S where S, a diagonal matrix, is not 0: estimates from inside.

    Parameters
    ----------
    a, lower : Tensor
        (..., n, n), in whatever precision, and its Cholesky factor in float64.
    scale : Tensor
        Diagonal of S (..., n).

    Returns
    -------
    low, high : Tensor
        (...,) infinity and 0 where all of S is 0.
    """
    # Lanczos' method for S a S and for its inverse, side by side, with vectors in rows.
    seen = scale > 0
    both = torch.stack([scale, torch.where(seen, scale, torch.inf).reciprocal()], -2)  # (..., 2, n)
    new = (torch.arange(a.shape[-1], dtype=lower.dtype, device=a.device).mul(2.4).cos() * seen)[..., None, :]
    old, length = torch.zeros_like(both), new.norm(dim=-1, keepdim=True)
    diagonal, below = [], []
    for _ in range(_CONDITION_STEPS):
        old, new = new / length.clamp_min(1e-300), old
        up, down = (both * old).split(1, -2)
        down = torch.linalg.solve_triangular(lower, down.mT, upper=False)
        down = torch.linalg.solve_triangular(lower.mT, down, upper=True)  # cholesky_solve copies a batch's factor
        new = torch.cat([up.to(a.dtype) @ a, down.mT], -2) * both - length * new
        diagonal.append(torch.linalg.vecdot(old, new)[..., None])
        new = new - diagonal[-1] * old
        length = new.norm(dim=-1, keepdim=True)
        below.append(length)
    main, side = torch.cat(diagonal, -1), torch.cat(below[:-1], -1)  # (..., 2, steps)
    projected = torch.diag_embed(main) + torch.diag_embed(side, -1)  # of which the lower triangle counts
    top = ops.eigh(projected)[0][..., -1]
    return top[..., 1].reciprocal(), top[..., 0]
