"""WHERE a network can grow: pairs of layers whose hidden units nothing else reads."""

from __future__ import annotations

import inspect
import logging
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from growkern import between as _between
from growkern.between import Between
from growkern.eval_mode import evaluating

logger = logging.getLogger(__name__)

_SHAPE_QUERIES = {"size", "dim", "ndimension", "numel", "shape", "ndim", "device", "dtype"}


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
    try:
        producer, consumer = _layer(model, site.producer), _layer(model, site.consumer)
        between = _between.resolve(model, site.between)
        if isinstance(producer, nn.Linear) and (isinstance(consumer, nn.Conv2d) or between.pools or between.flatten):
            raise ValueError("a Linear producer needs a Linear consumer, with no pooling or flattening between")
        if isinstance(producer, nn.Conv2d) and isinstance(consumer, nn.Linear) != between.flatten:
            raise ValueError("a Conv2d producer needs a Conv2d consumer, or flattening ahead of a Linear one")
        units, reads = producer.weight.shape[0], consumer.weight.shape[1]
        if reads % units if between.flatten else reads != units:
            raise ValueError(f"{site.consumer} reads {reads} features, which does not fit {units} hidden units")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"site {site.name!r}: {error}") from None
    return Layers(producer, consumer, between)


def find_sites(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> list[GrowthSite]:
    """Find every place where a model can grow, by tracing it with `torch.fx`.

    A site is a Linear or Conv2d layer whose output reaches exactly one other such layer through activations,
    norms, pooling, dropout and flattening. In residual networks these are the inner layers of the blocks.
    Places that look like a site and are not are logged with the reason (logger ``growkern.sites``).

    Parameters
    ----------
    model : nn.Module
        A plain model; it is not changed.
    example_inputs : Tensor or tuple
        What the model is called with; a tuple holds several arguments.

    Returns
    -------
    list of GrowthSite
        In the order in which the model calls the producers.

    Raises
    ------
    RuntimeError
        If the model cannot be traced; the message says where, and how to name sites by hand.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with evaluating(model), torch.no_grad():
        graph = _trace(model, inputs)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    sites = []
    for node in graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) in (nn.Linear, nn.Conv2d):
            candidates = _follow(model, node)
        else:
            candidates = _inside(module, str(node.target))
        for site in candidates:
            try:
                norm = resolve(model, site).between.norm
            except ValueError as error:
                logger.info("%s is left out: %s", site, error)
                continue
            norms = [n for n in site.between if norm is not None and n in calls and model.get_submodule(n) is norm]
            if repeated := [n for n in (str(node.target), site.consumer, *norms) if calls[n] > 1]:
                logger.info("%s is left out: %s is called more than once", site, ", ".join(repeated))
            else:
                sites.append(site)
    return sites


def _layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(f"{name} is a {type(layer).__name__}; expected Linear or Conv2d")
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise ValueError(f"{name} has groups={layer.groups}; only groups=1 can grow")
        if layer.padding_mode != "zeros":
            raise ValueError(f"{name} has padding_mode={layer.padding_mode!r}; only 'zeros' can grow")
    own = layer._parameters.get("weight")
    if not isinstance(own, nn.Parameter):
        raise ValueError(
            f"{name}.weight is computed (a parametrization, weight_norm or the like), not a plain parameter"
        )
    holders = sum(own is p for module in model.modules() for p in module._parameters.values())
    if holders > 1:
        raise ValueError(f"{name}.weight is shared with another module")
    return layer


def _trace(model: nn.Module, inputs: tuple[Any, ...]) -> fx.Graph:
    parameters = list(inspect.signature(model.forward).parameters.values())[len(inputs) :]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        traced = fx.GraphModule(model, graph := fx.Tracer().trace(model, concrete_args=defaults or None))
        ShapeProp(traced).propagate(*inputs)
    except Exception as error:
        raise RuntimeError(
            f"find_sites could not trace {type(model).__name__}: {type(error).__name__}: {str(error).strip()}\n"
            "torch.fx needs a forward without branches on the values of tensors. Name the sites by hand instead, "
            "producer, consumer and what lies between, and pass them on as `sites`:\n"
            "    growkern.GrowthSite('fc1', 'fc2', between=('relu()',))"
        ) from error
    return graph


def _follow(model: nn.Module, node: fx.Node) -> Iterator[GrowthSite]:
    """Walk from a layer's output along its only reader until the next layer."""
    producer = str(node.target)
    between: list[str] = []
    while True:
        readers = [user for user in node.users if not _is_shape_query(user)]
        if len(readers) != 1 or len(readers[0].all_input_nodes) - _shape_inputs(readers[0]) != 1:
            return
        node, before = readers[0], node
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if type(module) in (nn.Linear, nn.Conv2d):
                yield GrowthSite(producer, str(node.target), tuple(between))
                return
            between.append(str(node.target))
        elif node.op in ("call_function", "call_method"):
            between.append(_describe(node, before))
        else:
            return


def _describe(node: fx.Node, before: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name in ("view", "reshape", "flatten"):
        old, new = _shape(before), _shape(node)
        if len(old) == 4 and new == (old[0], old[1] * old[2] * old[3]):
            return "flatten(start_dim=1)"
    return _between.call_text(name, node.args[1:], dict(node.kwargs))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _is_shape_query(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPE_QUERIES
    return node.op == "call_method" and node.target in _SHAPE_QUERIES


def _shape_inputs(node: fx.Node) -> int:
    """Count the inputs of a node that carry sizes rather than values, as in ``x.view(x.size(0), -1)``."""

    def carries_size(source: fx.Node) -> bool:
        if source.target is operator.getitem or source.target in (operator.mul, operator.floordiv):
            return all(carries_size(n) for n in source.all_input_nodes)
        return _is_shape_query(source)

    return sum(carries_size(source) for source in node.all_input_nodes)


def _inside(module: nn.Module | None, name: str) -> Iterator[GrowthSite]:
    """Sites inside modules of torch.nn that tracing does not enter: the feed-forward of Transformer layers."""
    for inner, layer in module.named_modules() if module is not None else ():
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            path = f"{name}.{inner}" if inner else name
            activation = layer.activation
            by_module = isinstance(activation, nn.Module)
            text = f"{path}.activation" if by_module else _between.call_text(activation.__name__, (), {})
            yield GrowthSite(f"{path}.linear1", f"{path}.linear2", (text, f"{path}.dropout"))
