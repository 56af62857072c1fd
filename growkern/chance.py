"""How many neurons are real: what chance alone produces, from the same data with random signs."""

from __future__ import annotations

import torch
from torch import Tensor

from growkern.moments import Moments
from growkern.whitening import Factor, top_singular_value, whiten_both

DEVIATIONS = 5.0  # above the mean of the draws' tops, in standard deviations: at most 1% false positives


def threshold(
    moments: Moments, x: Factor | None, v: Factor | None, hh: Factor | None, bottleneck: float, project: bool
) -> float:
    """Singular value above which a direction stands out of what chance produces; arguments as for `tops`."""
    found = tops(moments, x, v, hh, bottleneck, project)
    spread = float(found.std()) if len(found) > 1 else 0.0
    return float(found.mean()) * (1 + 1e-6) + DEVIATIONS * spread


def tops(
    moments: Moments, x: Factor | None, v: Factor | None, hh: Factor | None, bottleneck: float, project: bool
) -> Tensor:
    """Largest singular values of targets with random signs, whitened as the method whitens its own.

    Random signs, one per image or sequence, keep whatever correlations, heavy tails and rank the data has and
    destroy only the link between x and v⊥.

    Parameters
    ----------
    moments : Moments
        With `null` measured.
    x, v : Factor or None
        What the method whitens x and v with.
    hh : Factor or None
        Factor of `hh`; needed where `null_h` is measured.
    bottleneck : float
        Ψ = E‖v⊥‖².
    project : bool
        Whether the method's target is N, orthogonal to h, rather than xv.

    Returns
    -------
    Tensor
        (draws,), in the unit of the whitened target's singular values.

    Raises
    ------
    ValueError
        If no draws were measured.
    """
    if moments.null is None:
        raise ValueError("neurons: 'auto' needs draws of chance; use collect(..., null_draws=16), or give an integer")
    null = moments.null.double()  # (draws, p, r·offsets)
    # A draw is of v⊥, which has lost what h explains of noise: so has N, but xv has not, and the projection of a
    # draw loses it again. How much that is, the draws themselves say, whatever the correlations between samples.
    if moments.null_h is not None and hh is not None:
        draws, q, r = moments.null_h.shape
        null_h = moments.null_h.double().movedim(0, 1).reshape(q, draws * r)
        carried = hh.solve(null_h)
        lost = (null_h * carried).sum() / draws / max(bottleneck, 1e-300)
        if project and moments.xh is not None:
            null = null - torch.einsum("pq,qdr->dpr", moments.xh.double(), carried.view(q, draws, r))
        null = null / (1 - lost).clamp_min(1e-3).sqrt()
    return torch.stack([top_singular_value(whiten_both(draw, x, v, moments.offsets)) for draw in null])
