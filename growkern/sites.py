"""WHERE a network can grow: pairs of layers whose hidden units nothing else reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from growkern import between as _between
from growkern.arguments import check_instance
from growkern.between import Between
from growkern.layers import check_own, growable
from growkern.trace import chains

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GrowthSite:
    """A place where hidden units can be added: new outputs of the producer are new inputs of the consumer.

    Parameters
    ----------
    producer, consumer : str
        Dotted names of two Linear or Conv2d modules of the model.
    between : tuple of str
        What lies between them, in order: dotted names of modules, or functional calls with named arguments
        such as ``"relu()"`` and ``"max_pool2d(kernel_size=2)"``.
    """

    producer: str
    consumer: str
    between: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.between, str) or not all(isinstance(n, str) for n in (self.producer, self.consumer)):
            raise ValueError(f"GrowthSite: expected two names and a tuple of names such as ('relu()',), got {self!r}")
        object.__setattr__(self, "between", tuple(self.between))

    @property
    def name(self) -> str:
        """The producer's dotted name."""
        return self.producer

    def __str__(self) -> str:
        return " -> ".join((self.producer, *self.between, self.consumer))


@dataclass
class Layers:
    """The modules of a site in one model."""

    producer: nn.Linear | nn.Conv2d
    consumer: nn.Linear | nn.Conv2d
    between: Between

    @property
    def units(self) -> int:
        """Hidden units of the site: features, or channels."""
        return self.producer.weight.shape[0]

    @property
    def unit_parameters(self) -> int:
        """Parameters that one more unit brings."""
        weights = (self.producer.weight.numel() + self.consumer.weight.numel()) // self.units
        return weights + (self.producer.bias is not None) + (0 if self.between.norm is None else 2)


def resolve(model: nn.Module, site: GrowthSite) -> Layers:
    """Look a site up in a model.

    Parameters
    ----------
    model : nn.Module
        The model.
    site : GrowthSite
        One of its sites.

    Returns
    -------
    Layers
        Its modules, and what lies between them.

    Raises
    ------
    ValueError
        If a module does not exist or cannot grow; the message says which and why.
    """
    check_instance("sites", site, GrowthSite)
    try:
        if site.producer == site.consumer:
            raise ValueError("producer and consumer are one layer")
        producer, consumer = growable(model, site.producer), growable(model, site.consumer)
        between = _between.resolve(model, site.between)
        if isinstance(producer, nn.Linear) and (isinstance(consumer, nn.Conv2d) or between.pools or between.flatten):
            raise ValueError("a Linear producer needs a Linear consumer, with no pooling or flattening between")
        if isinstance(producer, nn.Conv2d) and isinstance(consumer, nn.Linear) != between.flatten:
            raise ValueError("a Conv2d producer needs a Conv2d consumer, or flattening ahead of a Linear one")
        units, reads, norm = producer.weight.shape[0], consumer.weight.shape[1], between.norm
        if norm is not None:
            check_own(model, norm, "its norm")
            if (channels := norm.weight.numel()) != units:  # type: ignore[operator]
                raise ValueError(f"its norm has {channels} channels, which does not fit {units} hidden units")
        if reads % units if between.flatten else reads != units:
            raise ValueError(f"{site.consumer} reads {reads} features, which does not fit {units} hidden units")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"site {site.name!r}: {error}") from None
    return Layers(producer, consumer, between)


def find_sites(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> list[GrowthSite]:
    """Find every place where a model can grow, by tracing it with `torch.fx`.

    A site is a Linear or Conv2d layer whose output reaches exactly one other such layer through activations,
    norms, pooling, dropout and flattening. In residual networks these are the inner layers of the blocks.
    Places that look like a site and are not are logged with the reason (logger ``growkern.sites``).

    Parameters
    ----------
    model : nn.Module
        A plain model; it is not changed.
    example_inputs : Tensor or tuple
        What the model is called with; a tuple (or list) holds several arguments.

    Returns
    -------
    list of GrowthSite
        In the order in which the model calls the producers.

    Raises
    ------
    ValueError
        If the model is a wrapper, or cannot be called with the inputs.
    RuntimeError
        If it cannot be traced; the message says where, and how to name sites by hand.
    """
    return survey(model, example_inputs)[0]


def survey(model: nn.Module, example_inputs: Any) -> tuple[list[GrowthSite], list[str]]:
    """Find the sites of a model, as `find_sites` does, and for each place that is none after all the reason."""
    check_instance("model", model, nn.Module)
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    sites, reasons = [], []
    for chain in chains(model, inputs):
        site = GrowthSite(chain.producer, chain.consumer, chain.between)
        obstacle = chain.obstacle
        try:
            layers = resolve(model, site)
            if not (layers.producer.weight.requires_grad or layers.consumer.weight.requires_grad):
                obstacle = "both of its layers are frozen"
        except ValueError as error:
            obstacle = str(error).removeprefix(f"site {site.name!r}: ")
        if obstacle:
            reasons.append(f"{site}: {obstacle}")
            logger.info("left out: %s", reasons[-1])
        else:
            sites.append(site)
    return sites, reasons
