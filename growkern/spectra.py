"""Parts of spectra, where a full decomposition would cost more: tops, extremes, and what stands above a cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from growkern import ops

WIDE = 512  # rows of a matrix, from which on a few singular values cost less by Lanczos' method


def product(a: Tensor, b: Tensor) -> Tensor:
    """Give a b for b (..., n, k) of few columns; on a CPU its transpose costs a third of the time."""
    return (b.mT @ a.mT).mT


def top_singular(
    square: Callable[[Tensor], Tensor], empty: Tensor, most: int, above: float, block: int = 16
) -> tuple[Tensor, Tensor] | None:
    """Largest singular values (..., k) of one matrix and vectors (..., s, k) of its smaller side, by block Lanczos.

    Parameters
    ----------
    square : callable
        Multiplies a few columns (..., s, m) by the matrix and its transpose.
    empty : Tensor
        No columns (..., s, 0), for their shape.
    most : int
        How many are wanted at most.
    above : float
        Size below which none is wanted.
    block : int
        Columns of a step.

    Returns
    -------
    tuple of Tensor, or None
        None where this would not pay: many are wanted, or they converge slowly.
    """
    s = empty.shape[-2]
    if not above and most > s // 32:
        return None
    basis, projected = empty.view(s, 0), empty.new_zeros(0, 0)
    places = torch.arange(s * block, dtype=empty.dtype, device=empty.device).view(s, block)
    fresh, before = torch.linalg.qr(places.square().mul(0.7).cos())[0], 1.0
    while basis.shape[1] < s // 3:
        basis = torch.cat([basis, fresh], 1)
        image = square(fresh.reshape(*empty.shape[:-1], block)).reshape(s, block)
        along = basis.mT @ image
        image = image - basis @ along
        fresh, rest = torch.linalg.qr(image - basis @ (basis.mT @ image))
        projected = torch.cat([torch.nn.functional.pad(projected, (0, 0, 0, block)), along], 1).triu()
        if basis.shape[1] % (2 * block):
            continue
        w, vectors = ops.eigh(projected.mT)  # of which the lower triangle counts
        w, vectors = w.flip(0), vectors.flip(1)
        residuals = (rest @ vectors[-block:]).norm(dim=0)
        count = min(most, int((w > above**2).sum()))
        early = basis.shape[1] == 2 * block  # too early to tell that it will not pay
        if count > len(w) // 2:
            if early:
                continue
            return None
        if count >= block and bool((w[: count - block + 1] - w[block - 1 : count] <= 1e-6 * w[0]).any()):
            return None  # a block finds as many equal values as it has columns, and there may be more
        others_below = count == most or bool(w[count] + residuals[count] <= above**2)
        worst = float(residuals[:count].max() / w[0]) if count else 0.0
        if others_below and worst <= 1e-10:
            found = basis @ vectors[:, :count]
            return w[:count].sqrt().view(*empty.shape[:-2], -1), found.view(*empty.shape[:-1], -1)
        left = (s // 3 - basis.shape[1]) / (2 * block)
        if not early and worst * (worst / before) ** left > 1e-10:  # in a bulk of noise it converges too slowly to pay
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


def dominant(a: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
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


def extreme_eigenvalues(a: Tensor, lower: Tensor, alive: Tensor, steps: int = 12) -> tuple[Tensor, Tensor]:
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
