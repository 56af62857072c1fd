"""How strongly new neurons join in: the amplitude that lowers the loss most."""

from __future__ import annotations

import itertools
from collections.abc import Callable

_UP, _DOWN = [4.0**k for k in (0, 1, 2)], [4.0**-k for k in (0, 1, 2)]
_SMALL = [4.0**-k for k in (3, 4)]


def best_amplitude(loss: Callable[[float], float], at_zero: float) -> tuple[float, float]:
    """Seek the amplitude of least loss on a geometric grid of both signs, then half and twice the best.

    From 1 it goes up by factors of 4 as long as the loss falls, else down. All of {1/16, …, 16} counts where that
    finds none below the loss at 0, then the same below zero, and then ±{1/64, 1/256}.

    Parameters
    ----------
    loss : callable
        Loss at an amplitude.
    at_zero : float
        That at 0, which is known.

    Returns
    -------
    tuple of float
        The amplitude and its loss; 0 if none is below the loss at 0.
    """
    losses = {0.0: at_zero}

    def at(scale: float) -> float:
        if scale not in losses:
            losses[scale] = loss(scale)
        return losses[scale]

    def best() -> float:
        return min(losses, key=lambda scale: losses[scale])

    for sign in (1, -1):
        if best():
            break
        for way in (_UP, _DOWN):
            steps = itertools.pairwise(sign * size for size in way)
            if list(itertools.takewhile(lambda step: at(step[1]) < at(step[0]), steps)):
                break
        if not best():
            losses |= {sign * size: at(sign * size) for size in (*_UP, *_DOWN)}
    if not best():
        losses |= {sign * size: loss(sign * size) for sign in (1, -1) for size in _SMALL}
    if around := best():
        losses |= {scale: loss(scale) for scale in (around / 2, around * 2)}
    return best(), losses[best()]
