"""Give a fresh model the widths of a grown one, so that the grown one's state can be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from growkern.arguments import check_count, check_instance, listed
from growkern.neurons import NewNeurons
from growkern.sites import GrowthSite, resolve
from growkern.surgery import apply


def widen(
    model: nn.Module,
    sites: Sequence[GrowthSite],
    widths: Mapping[str, int],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Widen sites with units whose weights are all zero; the model's function stays as it is.

    ``model.load_state_dict`` then takes the state of a model that was grown to these widths. Copies of a model that
    training keeps grow with it: ``widen(averaged.module, grower.sites, event.widths)``.

    Parameters
    ----------
    model : nn.Module
        The model, changed in place.
    sites : sequence of GrowthSite
        Its sites, as `find_sites` gives them.
    widths : mapping of str to int
        Units by name of site, as in `GrowthEvent.widths`; sites that are not named stay as they are.
    optimizer : torch.optim.Optimizer, optional
        Its parameter groups and state follow.

    Raises
    ------
    ValueError
        If a name is not that of a site, or a site is wider already, or grows by groups. Nothing has changed then.
    """
    sites = listed("sites", sites, "a list of growth sites")
    check_instance("widths", widths, Mapping, "units by name of site")
    granules = {site.name: resolve(model, site).between.multiple for site in sites}
    units = {site.name: resolve(model, site).units for site in sites}
    for name, wanted in widths.items():
        if name not in units:
            raise ValueError(f"widths: {name!r} is no site of the model; there are {', '.join(units) or 'none'}")
        check_count(f"widths[{name!r}]", wanted)
        if wanted < units[name]:
            raise ValueError(f"widths: {name!r} has {units[name]} units already, more than {wanted}")
        if multiple := (wanted - units[name]) % granules[name]:
            raise ValueError(
                f"widths: {name!r} grows by multiples of {granules[name]} units; {wanted} leaves {multiple}"
            )
    for site in sites:
        if count := widths.get(site.name, units[site.name]) - units[site.name]:
            apply(model, _silent(model, site, count), optimizer=optimizer)


def _silent(model: nn.Module, site: GrowthSite, count: int) -> NewNeurons:
    """Units that read nothing and that nothing reads."""
    layers = resolve(model, site)
    producer, consumer = layers.producer, layers.consumer
    zeros = torch.zeros(count, dtype=torch.float64, device=producer.weight.device)
    reads = consumer.weight[0].numel() + (consumer.bias is not None)
    return NewNeurons(
        site=site,
        method="random",
        kernel="full" if consumer.weight.dim() == 4 or layers.between.flatten else "linear",
        alpha=zeros.new_zeros(count, producer.weight[0].numel() + (producer.bias is not None)),
        omega=zeros.new_zeros(consumer.weight.numel() // layers.units, count),
        singular_values=zeros,
        best_update=zeros.new_zeros(len(consumer.weight), reads),
        bottleneck=0.0,
        reachable=0.0,
        removed=0.0,
        gain=0.0,
        rank=0,
        condition=1.0,
        noise=None,
        cut=0,
        mean=zeros,
        variance=zeros + 1,
    )
