"""How many neurons are real: what chance alone produces, from the same data with random signs."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from growkern.arguments import check_draws
from growkern.spectra import largest_eigenvalue
from growkern.stacks import Stack
from growkern.whitening import LARGEST_PADDED, Factor, by_row

LEAST_LEFT = 0.05  # share of the samples' dimensions that h leaves; below, whatever is left of v says nothing of chance
DEVIATIONS, DRAWS = 5.0, 16  # above the mean of so many tops, in standard deviations: at most 1% false positives


@functools.cache
def deviations(draws: int) -> float:
    """Give what is exceeded as seldom with fewer or more draws as DEVIATIONS are with DRAWS.

    One more of `draws` normal numbers is off their mean by √(1 + 1/draws) of their standard deviation, times a
    Student's t of draws − 1 degrees of freedom.

    Parameters
    ----------
    draws : int
        Two or more.

    Returns
    -------
    float
        Standard deviations above the mean: 24.4 for 4 draws, 7.42 for 8, 5 for 16, 4.26 for 32.
    """
    wanted = _outside(DEVIATIONS / math.sqrt(1 + 1 / DRAWS), DRAWS - 1)
    low, high = 0.0, 1e6
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(middle, draws - 1) > wanted else (low, middle)
    return high * math.sqrt(1 + 1 / draws)


def _outside(t: float, freedom: int) -> float:
    """Probability that Student's t is off 0 by more than t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def threshold(
    moments: Stack, x: Factor | None, v: Factor | None, hh: Factor | None, bottleneck: Tensor, project: bool
) -> Tensor:
    """Singular value (B,) above which a direction stands out of what chance produces; arguments as for `tops`."""
    found = tops(moments, x, v, hh, bottleneck, project)
    samples = moments.numbers([each.samples for each in moments.parts])
    expressed = (moments.hh.diagonal(dim1=1, dim2=2) > 0).sum(1) if hh is None else hh.rank
    above = found.mean(1) * (1 + 1e-6) + deviations(found.shape[1]) * found.std(1)
    # Of about as many directions as samples h expresses any v, noise too, and v⊥ is rounding.
    return torch.where(expressed > (1 - LEAST_LEFT) * samples, torch.inf, above)


def tops(
    moments: Stack, x: Factor | None, v: Factor | None, hh: Factor | None, bottleneck: Tensor, project: bool
) -> Tensor:
    """Largest singular values of targets with random signs, whitened as the method whitens its own.

    Random signs, one per image or sequence (see `growkern.draws`), keep whatever correlations, heavy tails and rank the
    data has and destroy only the link between x and v⊥.

    Parameters
    ----------
    moments : Stack
        Of B sites, with `null` measured.
    x, v : Factor or None
        What the method whitens x and v with.
    hh : Factor or None
        Factor of `hh`; needed where `null_h` is measured.
    bottleneck : Tensor
        Ψ = E‖v⊥‖², (B,).
    project : bool
        Whether the method's target is N, orthogonal to h, rather than xv.

    Returns
    -------
    Tensor
        (B, draws), in the unit of the whitened target's singular values.

    Raises
    ------
    ValueError
        If fewer than two draws were measured.
    """
    check_draws(0 if moments.null is None else moments.null.shape[1], needed=True)
    assert moments.null is not None
    null, offsets = moments.null, moments.offsets  # (B, draws, p, r·offsets)
    draws, width = null.shape[1], null.shape[3] if v is None else v.width * offsets
    # A draw is of v⊥, which has lost what h explains of noise: so has N, but xv has not, and the projection of a
    # draw loses it again. How much that is, the draws themselves say, whatever the correlations between samples.
    # What xv would have to give back, rows of much weight in h have lost more than others: for it the whole share is
    # divided out and not its root, as leave-one-out residuals do.
    kept, carried = bottleneck.new_ones(()), None
    if moments.null_h is not None and hh is not None:
        null_h = moments.null_h.double().transpose(1, 2)  # (B, q, draws, r)
        carried = hh.solve(null_h.flatten(2)).view(null_h.shape)
        kept = 1 - (null_h * carried).sum((1, 2, 3)) / draws / bottleneck.clamp_min(1e-300)
    elif not project:  # for "full" nothing tells, but h has taken no more of noise than of v
        kept = bottleneck / moments.vv.diagonal(dim1=1, dim2=2).double().sum(1).clamp_min(1e-300)
    xh = moments.xh if project and carried is not None else None

    def gram(b: Tensor) -> Tensor:
        """TᵀT b for b (B, r·offsets, draws), with T a whitened draw, which is never formed."""
        right = b if v is None else by_row(v.unwhiten, b, offsets)
        left = (right.mT[..., None, :].to(null.dtype) @ null.mT).squeeze(-2).double().mT  # (B, p, draws)
        if xh is not None:
            left = left - xh @ torch.einsum("bqdr,brd->bqd", carried, right)
        left = left if x is None else x.unwhiten(x.whiten(left))
        right = (left.mT[..., None, :].to(null.dtype) @ null).squeeze(-2).double().mT
        if xh is not None:
            right = right - torch.einsum("bqdr,bqd->brd", carried, xh.mT @ left)
        return right if v is None else by_row(v.whiten, right, offsets)

    start = torch.arange(width, dtype=torch.float64, device=null.device).square().mul(0.7).cos()
    narrow = min(null.shape[2:])
    steps = min(narrow, 8 + round(2 * narrow ** (1 / 3)))  # white noise: to a tenth of the tops' spread, from below
    start = start[:, None].expand(len(null), width, draws)
    alone = null.shape[3] > LARGEST_PADDED  # others in a stack would change when all have settled, and so thresholds
    largest = largest_eigenvalue(gram, start, steps, settle=alone and not null.is_cuda)
    kept = kept.clamp_min(1e-3)
    return largest.clamp_min(0).sqrt() / (kept.sqrt() if project else kept)[..., None]
