"""Chains of layers in a traced model: from one Linear or Conv2d to the next that alone reads its output."""

from __future__ import annotations

import dis
import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from growkern import between as _between
from growkern.eval_mode import evaluating

_SHAPE_QUERIES = {"size", "dim", "ndimension", "numel", "shape", "ndim", "device", "dtype"}


@dataclass(frozen=True)
class Chain:
    """Dotted names of two layers and of what lies between them, and why they are no growth site, if so."""

    producer: str
    consumer: str
    between: tuple[str, ...]
    obstacle: str = ""


def chains(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[Chain]:
    """Trace a model and walk from every Linear and Conv2d along its only reader to the next one.

    Parameters
    ----------
    model : nn.Module
        The model; it is not changed.
    inputs : tuple
        Its arguments.

    Yields
    ------
    Chain
        In the order in which the model calls the producers.

    Raises
    ------
    ValueError
        If the model is a wrapper, or cannot be called with the inputs.
    RuntimeError
        If the model cannot be traced.
    """
    wrapped = getattr(model, "_orig_mod", getattr(model, "module", None))
    if isinstance(wrapped, nn.Module) and type(model).__module__.startswith("torch."):  # and no model of one's own
        inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise ValueError(f"model: {type(model).__name__} wraps the model to grow; pass model.{inner} instead")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model: a {type(model).__name__} cannot grow; pass the module that it was made of")
    graph = _trace(model, inputs)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = model.get_submodule(str(node.target))
        found = _follow(model, node) if isinstance(module, nn.Linear | nn.Conv2d) else _inside(module, str(node.target))
        for chain in found:
            norms = [n for n in chain.between if n in calls and _is_norm(model.get_submodule(n))]
            names = (chain.producer, *norms, chain.consumer)
            repeated = [n for n in (str(node.target), *norms, chain.consumer) if calls[n] > 1]
            apart = sorted({f"{name}.{own}" for name in names for own in ("weight", "bias")} & read)
            obstacle = ""
            if repeated:
                obstacle = f"{', '.join(repeated)} is called more than once"
            elif apart:
                obstacle = f"the forward pass reads {', '.join(apart)} outside of its layer too"
            elif norms and isinstance(module, nn.Linear) and len(_shape(node)) != 2:
                obstacle = f"its norm is along dimension 1, not the units, of {_shape(node)}"
            yield Chain(chain.producer, chain.consumer, chain.between, obstacle)


def _trace(model: nn.Module, inputs: tuple[Any, ...]) -> fx.Graph:
    parameters = list(inspect.signature(model.forward).parameters.values())[len(inputs) :]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        with evaluating(model), torch.no_grad():
            graph = _Tracer().trace(model, concrete_args=defaults or None)
            _Shapes(fx.GraphModule(model, graph)).run(*inputs)
    except Exception as error:
        _check_call(model, inputs)
        raise RuntimeError(
            f"find_sites could not trace {type(model).__name__}: {type(error).__name__}: {str(error).strip()}\n"
            "torch.fx needs a forward without branches on the values of tensors. Name the sites by hand instead, "
            "producer, consumer and what lies between, and pass them on as `sites`:\n"
            "    growkern.GrowthSite('fc1', 'fc2', between=('relu()',))"
        ) from error
    return graph


class _Tracer(fx.Tracer):
    """Takes whole what only inherits the forward of a torch layer, and what an ``assert`` asks for as given."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        owner = next(each for each in type(m).__mro__ if "forward" in vars(each))
        return owner.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(m, nn.Sequential)

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = inspect.currentframe()
        caller = frame and frame.f_back and frame.f_back.f_back  # behind Proxy.__bool__
        holds = _asserted(caller) if caller else None
        return super().to_bool(obj) if holds is None else holds


def _asserted(frame: FrameType) -> bool | None:
    """Truth value with which the assertion passes that a frame is about to make; None if it makes none."""
    steps = [step for step in dis.get_instructions(frame.f_code) if step.offset >= frame.f_lasti]
    for number, step in enumerate(steps[:4]):
        if "JUMP" in step.opname:
            fails = [at for at in steps if at.opname == "LOAD_ASSERTION_ERROR"]
            jumps_if = "IF_TRUE" in step.opname
            if steps[number + 1] in fails:
                return jumps_if
            return not jumps_if if step.argval in [at.offset for at in fails] else None
    return None


class _Shapes(fx.Interpreter):
    """Runs a graph and notes at each node the shape of its tensor."""

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            node.meta["shape"] = tuple(value.shape)
        return value


def _check_call(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise a ValueError if not the trace but the model itself fails on its inputs."""
    try:
        with evaluating(model), torch.no_grad():
            model(*inputs)
    except Exception as error:
        given = ", ".join(f"{type(x).__name__}{tuple(x.shape) if isinstance(x, Tensor) else ''}" for x in inputs)
        raise ValueError(
            f"model: {type(model).__name__} in evaluation mode fails when called as model({given}): "
            f"{type(error).__name__}: {error}\n"
            "A tuple of inputs is several arguments, anything else, a dict too, is one."
        ) from error


def _follow(model: nn.Module, node: fx.Node) -> Iterator[Chain]:
    """Walk from a layer's output along its only reader until the next layer."""
    producer = str(node.target)
    between: list[str] = []
    while True:
        readers = [user for user in node.users if not _is_shape_query(user)]
        if len(readers) != 1 or sum(not _carries_size(n) for n in readers[0].all_input_nodes) != 1:
            return
        node, before = readers[0], node
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield Chain(producer, str(node.target), tuple(between))
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
        flattens = len(old) == 4 and new == (old[0], old[1] * old[2] * old[3])
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
        if flattens and (name == "flatten" or sizes[-1] == -1 or isinstance(sizes[-1], fx.Node)):
            return "flatten(start_dim=1)"
        if flattens:
            return f"{name}(size={tuple(map(str, sizes))})"  # a fixed number of features does not grow
    return _between.call_text(name, node.args[1:], dict(node.kwargs))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ()))


def _is_shape_query(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPE_QUERIES
    return node.op == "call_method" and node.target in _SHAPE_QUERIES


def _carries_size(node: fx.Node) -> bool:
    """Whether a node holds sizes rather than values, as in ``x.view(x.size(0), -1)``."""
    if node.target in (operator.getitem, operator.mul, operator.floordiv):
        return all(_carries_size(n) for n in node.all_input_nodes)
    return _is_shape_query(node)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)


def _inside(module: nn.Module, name: str) -> Iterator[Chain]:
    """Find the feed-forward of Transformer layers inside modules of torch.nn, which tracing does not enter."""
    for inner, layer in module.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            path = f"{name}.{inner}" if inner else name
            activation = layer.activation
            function = getattr(activation, "__name__", type(activation).__name__)
            text = f"{path}.activation" if isinstance(activation, nn.Module) else _between.call_text(function, (), {})
            yield Chain(f"{path}.linear1", f"{path}.linear2", (text, f"{path}.dropout"))
