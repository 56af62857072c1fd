"""How many neurons are real: what chance alone produces, from the same data with random signs."""

from __future__ import annotations

import torch
from torch import Tensor

from growkern.spectra import largest_eigenvalue
from growkern.stacks import Stack
from growkern.whitening import LARGEST_PADDED, Factor, by_row

LEAST_LEFT = 0.05  # share of the samples' dimensions that h leaves; below, whatever is left of v says nothing of chance
DEVIATIONS = 5.0  # above the mean of the draws' tops, in standard deviations: at most 1% false positives


def threshold(
    moments: Stack, x: Factor | None, v: Factor | None, hh: Factor | None, bottleneck: Tensor, project: bool
) -> Tensor:
    """Singular value (B,) above which a direction stands out of what chance produces; arguments as for `tops`."""
    found = tops(moments, x, v, hh, bottleneck, project)
    spread = found.std(1) if found.shape[1] > 1 else 0.0
    samples = moments.numbers([each.count * each.positions for each in moments.parts])
    expressed = moments.numbers([len(each.hh) for each in moments.parts]) if hh is None else hh.rank
    above = found.mean(1) * (1 + 1e-6) + DEVIATIONS * spread
    # Of about as many directions as samples h expresses any v, noise too, and v⊥ is rounding.
    return torch.where(expressed > (1 - LEAST_LEFT) * samples, torch.inf, above)


def tops(
    moments: Stack, x: Factor | None, v: Factor | None, hh: Factor | None, bottleneck: Tensor, project: bool
) -> Tensor:
    """Largest singular values of targets with random signs, whitened as the method whitens its own.

    Random signs, one per image or sequence, keep whatever correlations, heavy tails and rank the data has and
    destroy only the link between x and v⊥.

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
        If no draws were measured.
    """
    if moments.null is None:
        raise ValueError("neurons: 'auto' needs draws of chance; use collect(..., null_draws=16), or give an integer")
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
