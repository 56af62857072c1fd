"""The drop-in under gromo: what stays gromo's own, and that it can be undone."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growkern.gromo import accelerate

pytest.importorskip("gromo", reason="gromo is not installed: pip install gromo==0.1.0")

from gromo.modules.conv2d_growing_module import Conv2dGrowingModule, RestrictedConv2dGrowingModule
from gromo.modules.linear_growing_module import LinearGrowingModule, LinearMergeGrowingModule
from gromo_layers import assert_same, conv_pair, linear_chain, measured

pytestmark = pytest.mark.filterwarnings("ignore:::gromo")

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
