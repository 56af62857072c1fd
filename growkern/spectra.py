"""Parts of spectra, where a full decomposition would cost more: tops, extremes, and what stands above a cut."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from growkern import ops

logger = logging.getLogger(__name__)

_RESIDUAL = 5e-9  # of TᵀT, relative to the geometric mean of the wanted eigenvalue and the largest
_VECTORS = 4  # of a basis, at least, for each singular value that it has to find
_PIVOTS = 64  # features that a step of Cholesky's method takes at once
_PATIENCE = 2**14  # over the square of a matrix's rows: vectors before slow convergence counts
CONDITION_STEPS = 4  # of Lanczos' method: conditions from 0.6 of the true ones on, from 0.95 near singular moments
_LONG = 8192  # rows of a matrix, of which all eigenvectors take minutes
SHIFT = 0.25  # of a cut-off: beyond what rounding takes eigenvalues below zero, and closer to them than to others
_NARROW = 36  # of a matrix's columns, those of a step that looks for its null space
BLOCK = 16  # columns of a step of block Lanczos
WIDE = 512  # rows of a matrix, from which on a few singular values cost less by Lanczos' method


def product(a: Tensor, b: Tensor) -> Tensor:
    """Give a b for b (..., n, k) of few columns; on a CPU its transpose costs a third of the time."""
    return (b.mT @ a.mT).mT


def solved(lower: Tensor, b: Tensor) -> Tensor:
    """Give a⁻¹ b for the Cholesky factor of a; `cholesky_solve` copies that of a batch."""
    return torch.linalg.solve_triangular(lower.mT, torch.linalg.solve_triangular(lower, b, upper=False), upper=True)


def top_singular(
    square: Callable[[Tensor], Tensor], start: Tensor, most: int, above: float, persist: bool = False
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
    persist : bool
        Go on as long as the basis may be, for many that converge together.

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
        if not persist and _VECTORS * count > s // 3:
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
        if not persist and len(w) >= max(4 * block, s**2 // _PATIENCE) and worst * rate**left > _RESIDUAL:
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
    if found is not None:
        return found[0].view(*lead, -1), found[1].view(*lead, n, -1)
    if n >= _LONG:
        logger.warning(
            "the second moment of %d features has neither few directions nor nearly all of them, as with few samples: "
            "its eigenvectors take long, and %.1f GiB; with more samples there would be no need of them",
            n,
            4 * n**2 * a.element_size() / 2**30,  # LAPACK's workspace is half of that
        )
    return ops.eigh(a)


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


def null_space(a: Tensor, shift: Tensor, cut: float) -> Tensor | None:
    """Orthonormal columns (n, k) that span the eigenvectors of a (n, n) for eigenvalues up to `cut`, where k is small.

    Parameters
    ----------
    a : Tensor
        Symmetric.
    shift : Tensor
        (n,) added to the diagonal, so that there is an inverse, of which they are the dominant eigenvectors: `SHIFT` of
        the cut-off, and more for features that are none.
    cut : float
        The cut-off.

    Returns
    -------
    Tensor or None
        None where they are too many, or the matrix is negative beyond the shift.
    """
    lower = a.mT.clone()
    lower.diagonal().add_(shift)
    info = torch.empty((), dtype=torch.int32, device=a.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if info:
        return None
    block = max(2 * BLOCK, len(a) // _NARROW)  # finds as many equal eigenvalues, which those of exact copies are
    start = torch.arange(len(a) * block, dtype=a.dtype, device=a.device).square().mul(0.7).cos().view(-1, block)
    above = ((1 + SHIFT) * cut) ** -0.5
    found = top_singular(lambda b: solved(lower, b), solved(lower, start), len(a), above, persist=True)
    # A basis that has outgrown the null space is less orthogonal; once more takes out what that let in.
    return None if found is None else torch.linalg.qr(solved(lower, found[1]))[0]


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
    for _ in range(CONDITION_STEPS):
        old, new = new / length.clamp_min(1e-300), old
        up, down = (both * old).split(1, -2)
        new = torch.cat([up.to(a.dtype) @ a, solved(lower, down.mT).mT], -2) * both - length * new
        diagonal.append(torch.linalg.vecdot(old, new)[..., None])
        new = new - diagonal[-1] * old
        length = new.norm(dim=-1, keepdim=True)
        below.append(length)
    main, side = torch.cat(diagonal, -1), torch.cat(below[:-1], -1)  # (..., 2, steps)
    projected = torch.diag_embed(main) + torch.diag_embed(side, -1)  # of which the lower triangle counts
    top = ops.eigh(projected)[0][..., -1]
    return top[..., 1].reciprocal(), top[..., 0]
