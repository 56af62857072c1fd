"""The drop-in under gromo: its statistics, in float64 as gromo computes them, and what stays its own."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growkern.gromo import accelerate

pytest.importorskip("gromo", reason="gromo is not installed: pip install gromo==0.1.0")

from gromo.modules.conv2d_growing_module import (
    Conv2dGrowingModule,
    FullConv2dGrowingModule,
    RestrictedConv2dGrowingModule,
)
from gromo.modules.growing_module import GrowingModule
from gromo.modules.linear_growing_module import LinearGrowingModule, LinearMergeGrowingModule
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:::gromo")

STATISTICS = (
    "tensor_s",
    "tensor_m",
    "covariance_loss_gradient",
    "tensor_m_prev",
    "cross_covariance",
    "tensor_s_growth",
)
REPLACED = (
    ("gromo.utils.tensor_statistic", "TensorStatistic.update"),
    ("gromo.modules.growing_module", "GrowingModule.update_computation"),
    ("gromo.modules.growing_module", "GrowingModule._auxiliary_compute_alpha_omega"),
    ("gromo.modules.growing_module", "GrowingModule.extended_forward"),
    ("gromo.modules.growing_module", "optimal_delta"),
    ("gromo.modules.growing_module", "compute_optimal_added_parameters"),
    ("gromo.containers.growing_block", "GrowingBlock.update_computation"),
    ("gromo.containers.growing_block", "GrowingBlock.extended_forward"),
    ("gromo.modules.linear_growing_module", "LinearGrowingModule.layer_of_tensor"),
    ("gromo.modules.conv2d_growing_module", "Conv2dGrowingModule.layer_of_tensor"),
    ("gromo.modules.conv2d_growing_module", "RestrictedConv2dGrowingModule.linear_layer_of_tensor"),
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


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def without_gromo(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make gromo's own statistics fail: each of them is an einsum."""

    def einsum(*args: object) -> None:
        raise AssertionError("gromo's own statistics ran")

    return lambda: monkeypatch.setattr(torch, "einsum", einsum)


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


# Statistics -----------------------------------------------------------------------------------------------


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


# What stays gromo's own -------------------------------------------------------------------------------------


class Halved(RestrictedConv2dGrowingModule):
    def compute_m_update(self, desired_activation: Tensor | None = None) -> tuple[Tensor, int]:
        update, samples = super().compute_m_update(desired_activation)
        return update / 2, samples


@pytest.mark.usefixtures("float64")
def test_a_method_that_a_subclass_overrides() -> None:
    batches = [torch.randn(2, 3, 8, 7)]
    expected = measured(conv_pair(Halved, "same", (True, True)), batches)
    with accelerate():
        assert_same(measured(conv_pair(Halved, "same", (True, True)), batches), expected, 1e-12)


def test_a_merge_module_before() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        first = LinearGrowingModule(3, 4)
        merge = LinearMergeGrowingModule(in_features=4, previous_modules=[first])
        first.next_module = merge
        last = LinearGrowingModule(4, 2, previous_module=merge)
        merge.set_next_modules([last])
        last.init_computation()
        last(merge(first(torch.ones(5, 3)))).square().sum().backward()
        last.update_computation()
        return [last.tensor_s(), last.tensor_m(), merge.previous_tensor_s(), last.covariance_loss_gradient()]

    expected = run()
    with accelerate():
        for found, tensor in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, tensor)


def nothing_stored(layers: list[Any]) -> None:
    layers[1](layers[0](torch.randn(2, 3)))
    layers[1].update_computation()


def no_gradient(layers: list[Any]) -> None:
    layers[1].init_computation()
    layers[1](layers[0](torch.randn(2, 3)))
    layers[1].update_computation()


def no_producer(layers: list[Any]) -> None:
    layers[0].tensor_m_prev.updated = False
    layers[0].store_pre_activity = True
    layers[0](torch.randn(2, 3)).sum().backward()
    layers[0].tensor_m_prev.update()


def wrong_kind(layers: list[Any]) -> None:
    layers = [Conv2dGrowingModule(1, 1, 1, input_size=(1, 3)), layers[0]]
    layers[1].previous_module = layers[0]
    layers[1].init_computation()
    layers[1](layers[0](torch.randn(2, 1, 1, 3)).flatten(1)).sum().backward()
    layers[1].update_computation()


def pooled(layers: list[Any]) -> None:
    layers = conv_pair(RestrictedConv2dGrowingModule, "same", (True, True))
    layers[0].post_layer_function = nn.MaxPool2d(2)
    layers[1].init_computation()
    layers[1](layers[0](torch.randn(2, 3, 8, 8))).sum().backward()
    layers[1].update_computation()


def nothing_measured(layers: list[Any]) -> None:
    layers[1].compute_optimal_updates()


def too_few(layers: list[Any]) -> None:
    measured(layers, [torch.randn(8, 3)])
    layers[1].compute_optimal_updates(maximum_added_neurons=-1)


def not_a_number(layers: list[Any]) -> None:
    measured(layers, [torch.full((8, 3), torch.nan)])
    layers[1].compute_optimal_updates()


@pytest.mark.parametrize(
    "attempt",
    [nothing_stored, no_gradient, no_producer, wrong_kind, pooled, nothing_measured, too_few, not_a_number],
    ids=lambda attempt: attempt.__name__,
)
def test_exceptions(attempt: Callable[[list[Any]], None]) -> None:
    def raised() -> tuple[type, str]:
        torch.manual_seed(0)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            attempt(linear_chain((True, True)))
        return caught.type, str(caught.value)

    expected = raised()
    with accelerate():
        assert raised() == expected


# On and off -------------------------------------------------------------------------------------------------


def functions() -> list[Any]:
    found = []
    for module, path in REPLACED:
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        found.append(vars(owner)[name])
    return found


def test_undone_is_as_it_was() -> None:
    originals = functions()
    with accelerate():
        assert all(now is not before for now, before in zip(functions(), originals, strict=True))
        inner = accelerate()
        inner.undo()
        inner.undo()
        assert all(now is not before for now, before in zip(functions(), originals, strict=True))
    assert all(now is before for now, before in zip(functions(), originals, strict=True))
    with pytest.raises(ZeroDivisionError), accelerate():
        _ = 1 / 0
    assert all(now is before for now, before in zip(functions(), originals, strict=True))


def test_nothing_else_is_replaced() -> None:
    def snapshot() -> dict[tuple[str, str], Any]:
        names = {module for module, _ in REPLACED} | {"gromo.utils.tools", "gromo.containers.resnet"}
        spaces = {name: vars(importlib.import_module(name)) for name in names}
        classes = {
            f"{module}.{name}": vars(value)
            for module, space in spaces.items()
            for name, value in space.items()
            if isinstance(value, type) and value.__module__ == module
        }
        return {(at, name): value for at, space in (spaces | classes).items() for name, value in dict(space).items()}

    before = snapshot()
    with accelerate():
        changed = {place for place, value in snapshot().items() if value is not before.get(place)}
    expected = set()
    for module, path in REPLACED:
        *parents, name = path.split(".")
        expected.add((".".join([module, *parents]), name))
    assert changed == expected


@pytest.mark.usefixtures("float64")
def test_modules_made_before_and_after(without_gromo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is whether it is in force when a batch is added, not when a module was made."""
    batches = [torch.randn(2, 3, 8, 7)]
    expected = measured(conv_pair(RestrictedConv2dGrowingModule, "same", (True, True)), batches)
    made_before = conv_pair(RestrictedConv2dGrowingModule, "same", (True, True))
    with accelerate():
        made_within = conv_pair(RestrictedConv2dGrowingModule, "same", (True, True))
        with monkeypatch.context():
            without_gromo()
            assert_same(measured(made_before, batches), expected, 1e-12)
    monkeypatch.undo()
    assert measured(made_within, batches).keys() == expected.keys()
    without_gromo()
    with pytest.raises(AssertionError, match="gromo's own"):
        measured(made_within, batches)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(ImportError, match=r"gromo: expected version 0\.1\.0, got 0\.2\.0"):
        accelerate()
