"""How many neurons are real: what chance alone produces, from the same data with random signs."""

from __future__ import annotations

import torch
from torch import Tensor

from growkern.stacks import Stack
from growkern.whitening import Factor, top_singular_value, whiten_both

DEVIATIONS = 5.0  # above the mean of the draws' tops, in standard deviations: at most 1% false positives


def threshold(
    moments: Stack, x: Factor | None, v: Factor | None, hh: Factor | None, bottleneck: Tensor, project: bool
) -> Tensor:
    """Singular value (B,) above which a direction stands out of what chance produces; arguments as for `tops`."""
    found = tops(moments, x, v, hh, bottleneck, project)
    spread = found.std(1) if found.shape[1] > 1 else 0.0
    return found.mean(1) * (1 + 1e-6) + DEVIATIONS * spread


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
    draws = moments.null.shape[1]  # of null (B, draws, p, r·offsets)
    # A draw is of v⊥, which has lost what h explains of noise: so has N, but xv has not, and the projection of a
    # draw loses it again. How much that is, the draws themselves say, whatever the correlations between samples.
    kept, carried = bottleneck.new_ones(()), None
    if moments.null_h is not None and hh is not None:
        null_h = moments.null_h.double().transpose(1, 2)  # (B, q, draws, r)
        carried = hh.solve(null_h.flatten(2)).view(null_h.shape)
        kept = 1 - (null_h * carried).sum((1, 2, 3)) / draws / bottleneck.clamp_min(1e-300)

    def drawn(number: int) -> Tensor:
        null = moments.null[:, number].double()  # type: ignore[index]
        if carried is not None and project and moments.xh is not None:
            null = null - moments.xh @ carried[:, :, number]
        return top_singular_value(whiten_both(null, x, v, moments.offsets))

    return torch.stack([drawn(number) for number in range(draws)], 1) / kept.clamp_min(1e-3).sqrt()[..., None]
