"""What lies BETWEEN producer and consumer: read from modules or from calls like ``"relu()"``, linearised at 0."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KINK = 1e-3  # one-sided derivatives at 0 that differ by more make an activation ReLU-like; below it one is flat
_STEP = 1e-5  # of the numerical derivatives at 0

_ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardtanh"),
    *("tanh", "softsign", "tanhshrink", "softshrink", "hardshrink", "threshold"),
    *("sigmoid", "hardsigmoid", "logsigmoid", "softplus"),
}
_ACTIVATION_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardtanh, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.RReLU),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus),
)
_NOTHING = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_NOTHING |= {"contiguous", "identity"}
_NOTHING_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_POOLS = {
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool2d": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool2d": ("output_size",),
    "adaptive_max_pool2d": ("output_size", "return_indices"),
}
_POOL_MODULES = {
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
}
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    **_POOLS,
    "flatten": ("start_dim", "end_dim"),
    "mean": ("dim", "keepdim"),
    "leaky_relu": ("negative_slope",),
    "threshold": ("threshold", "value"),
    "hardtanh": ("min_val", "max_val"),
    "softplus": ("beta", "threshold"),
    **dict.fromkeys(("elu", "celu"), ("alpha",)),
    **dict.fromkeys(("hardshrink", "softshrink"), ("lambd",)),
}


@dataclass(frozen=True)
class Pool:
    """A pooling layer taken as the average over its windows (exact for average pooling)."""

    name: str
    settings: dict[str, Any]

    def average(self, maps: Tensor) -> Tensor:
        """Pool maps of shape (B, C, H, W)."""
        if self.name.startswith("adaptive"):
            return F.adaptive_avg_pool2d(maps, self.settings["output_size"])
        settings = {
            k: self.settings[k] for k in ("kernel_size", "stride", "padding", "ceil_mode") if k in self.settings
        }
        inclusive = self.name == "avg_pool2d" and self.settings.get("count_include_pad", True)
        return F.avg_pool2d(maps, **settings, count_include_pad=inclusive)

    def window(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Kernel size and stride of an unpadded pooling of a (height, width) map in equal windows, else None."""
        if self.name.startswith("adaptive"):
            sizes = _pair(self.settings["output_size"])
            out = tuple(size if o is None else o for o, size in zip(sizes, (height, width), strict=True))
            if height % out[0] or width % out[1]:
                return None
            return (height // out[0], width // out[1]), (height // out[0], width // out[1])
        if _pair(self.settings.get("padding", 0)) != (0, 0) or self.settings.get("ceil_mode", False):
            return None
        kernel = _pair(self.settings["kernel_size"])
        stride = self.settings.get("stride")
        return kernel, kernel if stride in (None, ()) else _pair(stride)


@dataclass(frozen=True)
class Flatten:
    """Maps become the features of a linear consumer."""


Activation = Callable[[Tensor], Tensor]
Step = nn.Module | Pool | Flatten | Activation  # a module is a norm


@dataclass
class Between:
    """The layers of one site's `between`, resolved.

    Attributes
    ----------
    slope : float
        Mean of the one-sided derivatives at 0 of the activations in sequence.
    smooth : bool
        Whether these derivatives agree.
    homogeneous : bool
        Whether σ(c·t) = c·σ(t) for c > 0, as ReLU has it.
    norm : nn.Module or None
        BatchNorm or GroupNorm, ahead of any activation.
    pools : list of Pool
        In order; the first `pools_before_norm` come before the norm.
    flatten : bool
        Whether maps are flattened ahead of a linear consumer.
    multiple : int
        New units come in multiples of this (GroupNorm: the size of a group).
    """

    slope: float = 1.0
    smooth: bool = True
    homogeneous: bool = True
    norm: nn.Module | None = None
    pools: list[Pool] = field(default_factory=list)
    pools_before_norm: int = 0
    flatten: bool = False
    multiple: int = 1


def resolve(model: nn.Module, names: Sequence[str]) -> Between:
    """Read the `between` of a site.

    Parameters
    ----------
    model : nn.Module
        The model whose modules are named.
    names : sequence of str
        Dotted module names and functional calls such as ``"relu()"`` or ``"max_pool2d(kernel_size=2)"``.

    Returns
    -------
    Between
        What the entries amount to.

    Raises
    ------
    ValueError
        For an entry that does not exist, or across which no new unit can be predicted.
    """
    between = Between()
    activations: list[Activation] = []
    for name in names:
        for step in _parse(name) if name.endswith(")") else _steps_of(model.get_submodule(name), name):
            if isinstance(step, nn.Module):
                if activations or between.flatten or between.norm is not None:
                    raise ValueError(f"{name}: a norm must be the only one and come before activations and flattening")
                between.norm, between.pools_before_norm = step, len(between.pools)
                if isinstance(step, nn.GroupNorm):
                    between.multiple = step.num_channels // step.num_groups
            elif isinstance(step, Pool):
                between.pools.append(step)
            elif isinstance(step, Flatten):
                between.flatten = True
            else:
                activations.append(step)
    try:
        between.slope, between.smooth, between.homogeneous = _linearise(activations)
    except TypeError as error:
        raise ValueError(f"{', '.join(names)}: {error}") from None
    return between


def call_text(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Write a functional call with its arguments named, as `resolve` reads it."""
    name = name.rstrip("_")
    named = dict(zip(_ARGUMENTS.get(name, ()), args, strict=False))
    named |= {k: v for k, v in kwargs.items() if k not in ("inplace", "training", "p", "input")}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in named.items())})"


def _parse(text: str) -> list[Step]:
    """Read a functional call that is written as text; dropout and the like are no steps."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        settings = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"{text}: expected a call with named constants, as in 'max_pool2d(kernel_size=2)'") from None
    return _classify(call.func.id, settings, text)


def _steps_of(module: nn.Module, label: str) -> list[Step]:
    """Read a module as `_parse` reads the equivalent call; a norm stays a module."""
    if isinstance(module, _NOTHING_MODULES):
        return []
    if isinstance(module, _ACTIVATION_MODULES) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        return [copy.deepcopy(module).eval().double().cpu().forward]
    for kind, name in _POOL_MODULES.items():
        if isinstance(module, kind):
            return _classify(name, {k: getattr(module, k) for k in _POOLS[name] if hasattr(module, k)}, label)
    if isinstance(module, nn.Flatten):
        return _classify("flatten", {"start_dim": module.start_dim, "end_dim": module.end_dim}, label)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if not (module.affine and module.track_running_stats):
            raise ValueError(
                f"{label}: BatchNorm without weights or running statistics cannot be undone for a new unit"
            )
        return [module]
    if isinstance(module, nn.GroupNorm):
        if not module.affine:
            raise ValueError(f"{label}: GroupNorm without weights cannot be undone for a new unit")
        return [module]
    raise ValueError(f"{label}: {type(module).__name__} between two layers is not supported")


def _classify(name: str, settings: dict[str, Any], label: str) -> list[Step]:
    if name in _NOTHING:
        return []
    if name in _ACTIVATIONS:
        function = getattr(F, name)
        return [lambda t: function(t, **settings)]
    if name in _POOLS:
        refused = {"return_indices": (False,), "divisor_override": (None,), "dilation": (1, (1, 1))}
        for key, accepted in refused.items():
            if key in settings and settings[key] not in accepted:
                raise ValueError(f"{label}: {key}={settings[key]} is not supported in pooling between two layers")
        return [Pool(name, settings)]
    if name == "flatten" and settings.get("start_dim", 0) == 1 and settings.get("end_dim", -1) == -1:
        return [Flatten()]
    if name == "mean" and sorted(d % 4 for d in _sequence(settings.get("dim", ()))) == [2, 3]:
        pool = Pool("adaptive_avg_pool2d", {"output_size": (1, 1)})
        return [pool] if settings.get("keepdim", False) else [pool, Flatten()]
    raise ValueError(f"{label} between two layers is not supported")


def _linearise(activations: list[Activation]) -> tuple[float, bool, bool]:
    """Slope at 0, smoothness and homogeneity of activations in sequence; refuse those that move or flatten 0."""
    t = torch.tensor([-_STEP, 0.0, _STEP, -1.0, 1.0, -16.0, 16.0], dtype=torch.float64, device="cpu")
    for activation in activations:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            t = activation(t)
    below, at, above, *ones_and_sixteens = t.tolist()
    if at != 0:
        raise ValueError(f"the activation is {at:.3g} at 0: growing needs σ(0) = 0, or old outputs would change")
    left, right = -below / _STEP, above / _STEP
    if abs(left + right) < _KINK:
        raise ValueError("the activation is flat at 0: no new unit could be seen through it")
    homogeneous = [16 * value for value in ones_and_sixteens[:2]] == ones_and_sixteens[2:]
    return (left + right) / 2, abs(right - left) < _KINK, homogeneous


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int) or value is None else (value[0], value[-1])


def _sequence(value: Any) -> Sequence[int]:
    return (value,) if isinstance(value, int) else value
