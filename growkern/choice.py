"""WHICH site to grow: the one whose new neurons promise most for what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping

from growkern.moments import Moments
from growkern.neurons import NewNeurons


def best_site(
    moments: Mapping[str, Moments], found: Mapping[str, NewNeurons], cost: str, must_pay: bool
) -> tuple[str, str]:
    """Choose the site with the largest promise per unit of cost.

    Parameters
    ----------
    moments, found : mapping of str to Moments, to NewNeurons
        By name of the site: what was measured, and solved for.
    cost : {"parameters", "flops"}
        What a promise is divided by.
    must_pay : bool
        Take only sites whose new weights remove more per parameter than the consumer's existing ones still can.

    Returns
    -------
    tuple of str
        Name of the site, and the reason not to grow there, if there is one.
    """

    def promise(name: str) -> float:
        new, each = found[name], moments[name]
        if not len(new):
            return -math.inf
        by_square = new.method == "gradmax"  # it starts at zero: its gain is yet to come
        value = float(new.singular_values.square().sum()) if by_square else new.gain
        return value / (len(new) * (each.unit_parameters if cost == "parameters" else each.unit_flops))

    name = max(found, key=promise)
    if not len(found[name]):
        return name, _why_none(moments, found)
    if must_pay:
        paying = [each for each, new in found.items() if len(new) and _pays(moments[each], new)]
        return (max(paying, key=promise), "") if paying else (name, "training on pays more")
    return name, ""


def _why_none(moments: Mapping[str, Moments], found: Mapping[str, NewNeurons]) -> str:
    """Say why no site got neurons."""
    if not any(new.bottleneck + new.reachable for new in found.values()):
        why = "all gradients are zero"
    elif all(new.noise is None for new in found.values()):
        why = "no direction is left to add"
    else:
        why = "no neuron stands above chance"
    if any(found[name].noise == math.inf or each.samples <= len(each.hh) for name, each in moments.items()):
        why += "; samples are few for what layers read: give more batches"
    return why


def _pays(moments: Moments, new: NewNeurons) -> bool:
    """Whether new weights remove more per parameter than the consumer's existing ones still can."""
    return new.removed * new.best_update.numel() > new.reachable * len(new) * moments.unit_parameters
