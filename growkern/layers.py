"""Which single layers can grow: Linear and Conv2d whose parameters are their own."""

from __future__ import annotations

from torch import nn


def growable(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """Give the layer of a name; one that cannot grow is a ValueError that says why."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(f"{name} is a {type(layer).__name__}; expected Linear or Conv2d")
    if type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward):
        raise ValueError(
            f"{name} is of class {type(layer).__name__} with a forward of its own; expected that of torch.nn"
        )
    if not layer.weight.numel():
        raise ValueError(f"{name} has a weight of shape {tuple(layer.weight.shape)}; growing starts from one unit")
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise ValueError(f"{name} has groups={layer.groups}; only groups=1 can grow")
        if layer.padding_mode != "zeros":
            raise ValueError(f"{name} has padding_mode={layer.padding_mode!r}; only 'zeros' can grow")
    check_own(model, layer, name)
    return layer


def check_own(model: nn.Module, layer: nn.Module, name: str) -> None:
    """Refuse a layer whose weight or bias is computed, or is another module's too."""
    for own in ("weight", "bias"):
        parameter = layer._parameters.get(own)
        if parameter is None and getattr(layer, own) is not None:
            raise ValueError(f"{name}.{own} is computed (a parametrization, pruning or the like), not a parameter")
        holders = sum(parameter is p for module in model.modules() for p in module._parameters.values())
        if parameter is not None and holders > 1:
            raise ValueError(f"{name}.{own} is shared with another module")
