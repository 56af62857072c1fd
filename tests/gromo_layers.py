"""Pairs and chains of gromo's modules, and what they measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("gromo", reason="gromo is not installed: pip install gromo==0.1.0")

from gromo.modules.growing_module import GrowingModule
from gromo.modules.linear_growing_module import LinearGrowingModule

STATISTICS = (
    "tensor_s",
    "tensor_m",
    "covariance_loss_gradient",
    "tensor_m_prev",
    "cross_covariance",
    "tensor_s_growth",
)
SAME = {"kernel_size": 3, "padding": 1}
GEOMETRIES = {  # producer, consumer
    "same": (SAME, SAME),
    "valid": ({"kernel_size": 3}, {"kernel_size": 3}),
    "stride of the producer": ({**SAME, "stride": 2}, SAME),
    "stride of the consumer": (SAME, {**SAME, "stride": 2}),
    "strides": ({**SAME, "stride": (2, 1)}, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}),
    "dilation": ({**SAME, "dilation": 2, "padding": 2}, {**SAME, "dilation": (1, 2), "padding": (0, 2)}),
    "1×1": ({"kernel_size": 1}, {"kernel_size": 1}),
    "even, not square": ({"kernel_size": (1, 4), "padding": (0, 2)}, {"kernel_size": (2, 3), "padding": (1, 1)}),
    "more zeros than the kernel": ({"kernel_size": 3, "padding": 3}, {"kernel_size": 3, "padding": 2}),
    "one hidden position": ({"kernel_size": (8, 7)}, SAME),
    "5×5": (SAME, {"kernel_size": 5, "padding": 2}),
}


def conv_pair(kind: type, geometry: str, biases: tuple[bool, bool]) -> list[Any]:
    torch.manual_seed(0)
    made, read = GEOMETRIES[geometry]
    first = kind(3, 4, use_bias=biases[0], post_layer_function=nn.SELU(), input_size=(8, 7), **made)
    return [first, kind(4, 5, use_bias=biases[1], previous_module=first, allow_growing=True, **read)]


def linear_chain(biases: tuple[bool, bool]) -> list[Any]:
    torch.manual_seed(0)
    first = LinearGrowingModule(3, 4, use_bias=biases[0], post_layer_function=nn.SELU())
    return [first, LinearGrowingModule(4, 5, use_bias=biases[1], previous_module=first, allow_growing=True)]


def measured(layers: list[Any], batches: list[Tensor], update: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """Sums and sample counts of the last layer's statistics over some batches."""
    module = layers[-1]
    module.init_computation()
    for batch in batches:
        out = batch
        for layer in layers:
            out = layer(out)
        (out**3).sum().backward()
        (update or GrowingModule.update_computation)(module)
    return {name: (getattr(module, name)._tensor, getattr(module, name).samples) for name in STATISTICS}


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, (tensor, samples) in expected.items():
        assert found[name][1] == samples, name
        assert found[name][0].shape == tensor.shape, name
        assert (found[name][0].double() - tensor.double()).norm() <= tolerance * tensor.double().norm(), name
