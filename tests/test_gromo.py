"""The drop-in under gromo: its statistics, in float64 as gromo computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from growkern.gromo import accelerate

pytest.importorskip("gromo", reason="gromo is not installed: pip install gromo==0.1.0")

from gromo.modules.conv2d_growing_module import (
    FullConv2dGrowingModule,
    RestrictedConv2dGrowingModule,
)
from gromo.modules.growing_module import GrowingModule
from gromo.modules.linear_growing_module import LinearGrowingModule
from gromo_layers import GEOMETRIES, STATISTICS, assert_same, conv_pair, linear_chain, measured
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:::gromo")


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", [RestrictedConv2dGrowingModule, FullConv2dGrowingModule])
@pytest.mark.usefixtures("float64")
def test_conv2d_statistics(kind: type, geometry: str, without_gromo: Any) -> None:
    biases = (True, False) if list(GEOMETRIES).index(geometry) % 2 else (False, True)
    batches = [torch.randn(images, 3, 8, 7) for images in (2, 3)]
    expected = measured(conv_pair(kind, geometry, biases), batches)
    without_gromo()
    with accelerate():
        assert_same(measured(conv_pair(kind, geometry, biases), batches), expected, 1e-12)


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 3)])
@pytest.mark.parametrize("biases", [(True, False), (False, True), (True, True)])
@pytest.mark.usefixtures("float64")
def test_linear_statistics(shape: tuple[int, ...], biases: tuple[bool, bool], without_gromo: Any) -> None:
    batches = [torch.randn(shape), torch.randn(shape)]
    expected = measured(linear_chain(biases), batches)
    without_gromo()
    with accelerate():
        assert_same(measured(linear_chain(biases), batches), expected, 1e-12)


@pytest.mark.parametrize("make", [
    lambda: linear_chain((True, True)),
    lambda: conv_pair(RestrictedConv2dGrowingModule, "same", (True, True)),
    lambda: conv_pair(FullConv2dGrowingModule, "same", (True, True)),
    lambda: conv_pair(FullConv2dGrowingModule, "stride of the consumer", (True, True)),
], ids=["linear", "restricted", "full", "full, stride"])  # fmt: skip
@pytest.mark.usefixtures("float64")
def test_statistics_one_at_a_time(make: Any, without_gromo: Any) -> None:
    """Asked for outside update_computation, in an order of their own, a statistic is computed alone."""

    def update(module: Any) -> None:
        for name in reversed(STATISTICS):
            getattr(module, name).update()

    batches = [torch.randn(2, 3)] * 2 if isinstance(make()[0], LinearGrowingModule) else [torch.randn(2, 3, 8, 7)] * 2
    expected = measured(make(), batches)
    without_gromo()
    with accelerate():
        assert_same(measured(make(), batches, update), expected, 1e-12)


@pytest.mark.parametrize("kind", [RestrictedConv2dGrowingModule, FullConv2dGrowingModule])
def test_float32(kind: type) -> None:
    batches = [torch.randn(2, 3, 8, 7)] * 2
    expected = measured(conv_pair(kind, "same", (True, True)), batches)
    with accelerate():
        assert_same(measured(conv_pair(kind, "same", (True, True)), batches), expected, 2e-6)


class Largest(TorchDispatchMode):
    """Remembers the most elements that an op returned in one tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("kind", [RestrictedConv2dGrowingModule, FullConv2dGrowingModule])
def test_patches_are_never_unfolded(kind: type) -> None:
    def update(module: Any) -> None:
        with Largest() as largest:
            GrowingModule.update_computation(module)
        seen.append(largest.elements)

    seen: list[int] = []
    batch = torch.randn(16, 3, 24, 24)
    patches = 16 * 4 * 9 * 24 * 24  # of the consumer's input
    measured(conv_pair(kind, "same", (True, True)), [batch], update)
    with accelerate():
        measured(conv_pair(kind, "same", (True, True)), [batch], update)
    gromo, accelerated = seen
    assert gromo >= patches
    assert accelerated < patches / 4


@pytest.mark.usefixtures("float64")
def test_a_module_without_a_producer_and_a_chain(without_gromo: Any) -> None:
    """S of a layer is measured once, whether its own update or that of the next asks for it first."""

    def run() -> list[tuple[Tensor, int]]:
        layers = linear_chain((True, True))
        layers.append(LinearGrowingModule(5, 2, previous_module=layers[-1], allow_growing=True))
        for layer in layers:
            layer.init_computation()
        out = batch
        for layer in layers:
            out = layer(out)
        out.square().sum().backward()
        for layer in (layers[1], layers[0], layers[2]):
            layer.update_computation()
        assert all(layer._tensor_s.samples == 6 for layer in layers)
        names = [(layer, name) for layer in layers for name in STATISTICS[: 3 if layer is layers[0] else 6]]
        return [(getattr(layer, name)._tensor, getattr(layer, name).samples) for layer, name in names]

    batch = torch.randn(6, 3)
    expected = run()
    without_gromo()
    with accelerate():
        for (found, samples), (tensor, count) in zip(run(), expected, strict=True):
            assert samples == count
            torch.testing.assert_close(found, tensor, rtol=1e-12, atol=1e-12)


def test_an_updated_statistic_is_not_updated_again() -> None:
    with accelerate():
        layers = linear_chain((True, True))
        found = measured(layers, [torch.randn(4, 3)])
        before = {name: tensor.clone() for name, (tensor, _) in found.items()}
        layers[-1].update_computation()
    for name, tensor in before.items():
        assert torch.equal(getattr(layers[-1], name)._tensor, tensor)


@pytest.mark.usefixtures("float64")
def test_gradient_covariance_of_several_passes(without_gromo: Any) -> None:
    """The parts of gromo's exact Fisher: E alone, counted once, the rest without it."""

    def run() -> dict[str, Any]:
        layers = linear_chain((True, True))
        module = layers[-1]
        module.init_computation()
        out = module(layers[0](batch))
        out.sum().backward(retain_graph=True)
        module.update_computation(update_covariance_loss_gradient=False)
        for power in (2, 3):
            module.clear_pre_activity_grad()
            (out**power).sum().backward(retain_graph=True)
            module.update_covariance_loss_gradient(count_samples=power == 2)
        return {name: (getattr(module, name)._tensor, getattr(module, name).samples) for name in STATISTICS}

    batch = torch.randn(6, 3)
    expected = run()
    without_gromo()
    with accelerate():
        assert_same(run(), expected, 1e-12)
