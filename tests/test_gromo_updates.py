"""The drop-in under gromo: updates, whole containers, and half precision."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growkern.gromo import accelerate

pytest.importorskip("gromo", reason="gromo is not installed: pip install gromo==0.1.0")

from gromo.containers.growing_mlp import GrowingMLP
from gromo.containers.resnet import init_full_resnet_structure
from gromo.containers.vgg import VGG
from gromo.modules import growing_module
from gromo.modules.conv2d_growing_module import FullConv2dGrowingModule, RestrictedConv2dGrowingModule
from gromo.utils import tools

pytestmark = [pytest.mark.filterwarnings("ignore:::gromo"), pytest.mark.filterwarnings("ignore:dropout2d")]

CLASSES = 4


def moments(p: int, r: int, dtype: torch.dtype = torch.float64, rank: int | None = None) -> tuple[Tensor, ...]:
    """S (p, p), N (p, r) and E (r, r)."""
    torch.manual_seed(0)
    x, v = torch.randn(200, rank or p, dtype=dtype), torch.randn(200, r, dtype=dtype)
    x = x @ torch.randn(rank or p, p, dtype=dtype)
    return x.T @ x / 200, x.T @ (v + x[:, :1]) / 200, v.T @ v / 200


# Functions --------------------------------------------------------------------------------------------------


def assert_same_neurons(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """α, ω and singular values: each neuron up to its sign."""
    (alpha, omega, values), (alpha0, omega0, values0) = found, expected
    assert (alpha.shape, omega.shape, values.shape) == (alpha0.shape, omega0.shape, values0.shape)
    assert alpha.dtype == alpha0.dtype
    torch.testing.assert_close(values, values0, rtol=tolerance, atol=tolerance * float(values0.max()))
    for each, each0 in ((alpha, alpha0), (omega.T, omega0.T)):
        sign = (each * each0).sum(1, keepdim=True).sign()
        assert (sign * each - each0).norm() <= tolerance * each0.norm()
    product, product0 = omega @ alpha, omega0 @ alpha0
    assert (product - product0).norm() <= tolerance * product0.norm()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximum_added_neurons": 2},
        {"maximum_added_neurons": 0},
        {"statistical_threshold": 0.6},
        {"statistical_threshold": 1e9},
        {"numerical_threshold": 1.0},
        {"ignore_singular_values": True},
        {"alpha_zero": True},
        {"omega_zero": True},
        {"fisher": True},
        {"fisher": True, "e_numerical_threshold": 0.0},
        {"fisher": True, "e_numerical_threshold": 1.0},
        {"whiten": False},
        {"rank": 5},
        {"rank": 5, "dtype": torch.float32, "numerical_threshold": 1e-2, "tolerance": 2e-4},
        {"dtype": torch.float32, "tolerance": 2e-4},
        {"dtype": torch.float32, "statistical_threshold": 0.0, "tolerance": 2e-4},
        {"shape": (6, 9)},
    ],
    ids=str,
)
def test_added_parameters(options: dict[str, Any]) -> None:
    options = dict(options)
    tolerance, (p, r) = options.pop("tolerance", 1e-9), options.pop("shape", (12, 5))
    s, n, e = moments(p, r, options.pop("dtype", torch.float64), options.pop("rank", None))
    options["matrix_covariance_loss_gradient"] = e if options.pop("fisher", False) else None
    s = s if options.pop("whiten", True) else None
    expected = tools.compute_optimal_added_parameters(s, n, **options)
    with accelerate():
        found = growing_module.compute_optimal_added_parameters(s, n, **options)
    if len(expected[2]):
        assert_same_neurons(found, expected, tolerance)
    assert [each.shape for each in found] == [each.shape for each in expected]


def test_singular_values_over_many_orders() -> None:
    """Where a Gram side would lose the small ones: all of them are asked for."""
    u, v = (torch.linalg.qr(torch.randn(n, 6))[0] for n in (20, 6))
    n = (u * torch.logspace(0, -6, 6)) @ v.T
    options = {"statistical_threshold": 0.0}
    expected = tools.compute_optimal_added_parameters(None, n.double(), **options)
    with accelerate():
        found = growing_module.compute_optimal_added_parameters(None, n, **options)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-5, atol=0)
    directions = found[0].double() / found[2].double().sqrt()[:, None]
    torch.testing.assert_close(directions @ directions.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "smallest"), [(520, 1e-2), (520, 2e-6), (520, 5e-7), (1100, 1e-2)])
def test_wide_moments(rows: int, smallest: float) -> None:
    """Few neurons of a wide target; an eigenvalue well above, just above and below the threshold of 1e-6."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0]
    w = torch.linspace(1, 2, rows, dtype=torch.float64)
    w[0] = smallest
    s = (rotation * w) @ rotation.T
    real = torch.randn(rows, 6, dtype=torch.float64), torch.randn(6, 520, dtype=torch.float64)
    n = torch.randn(rows, 520, dtype=torch.float64) + (real[0] * torch.arange(3, 9)) @ real[1]
    options = {"maximum_added_neurons": 5}
    s = (s + s.T) / 2
    expected = tools.compute_optimal_added_parameters(s, n, **options)
    single = n.float()  # so that S is as exact as before
    with accelerate():
        found = growing_module.compute_optimal_added_parameters(s, single, **options)
    assert_same_neurons(found, tuple(each.float() for each in expected), 1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
def test_a_wide_moment_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a few neurons of a moment in single precision take beyond it: one factor, and what is small beside it."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    clock = importlib.import_module("clock").Clock("cpu")
    s = torch.eye(2048) + torch.full((2048, 2048), 0.5)
    n = torch.randn(2048, 4)
    with accelerate():
        growing_module.compute_optimal_added_parameters(s[:64, :64], n[:64])  # loads what is loaded once
        _, peak = clock.memory(lambda: growing_module.compute_optimal_added_parameters(s, n))
    assert peak < 1.3 * 8 * s.numel()


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_optimal_delta(dtype: torch.dtype, tolerance: float, fisher: bool) -> None:
    s, m, e = moments(12, 5, dtype)
    options = {"dtype": dtype, "tensor_covariance_loss_gradient": e if fisher else None}
    expected = tools.optimal_delta(s, m, **options)
    with accelerate():
        found = growing_module.optimal_delta(s, m, **options)
    for each, each0 in zip(found, expected, strict=True):
        torch.testing.assert_close(each, each0, rtol=tolerance, atol=tolerance * float(each0.abs().max()))


def test_a_singular_moment_is_gromo_s() -> None:
    """No Cholesky factor: gromo's own pseudo-inverse, with its warning."""
    s, m, _ = moments(12, 5)
    s[3], s[:, 3] = 0, 0
    with pytest.warns(UserWarning, match="pseudo-inverse"):
        expected = tools.optimal_delta(s, m)
    with accelerate(), pytest.warns(UserWarning, match="pseudo-inverse"):
        found = growing_module.optimal_delta(s, m)
    for each, each0 in zip(found, expected, strict=True):
        assert torch.equal(each, each0)


# Containers -------------------------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, Tensor]:
    return GrowingMLP(12, CLASSES, hidden_size=8, number_hidden_layers=2), torch.randn(16, 12)


def resnet(kind: type, hidden: int = 6) -> tuple[nn.Module, Tensor]:
    model = init_full_resnet_structure(
        (3, 8, 8),
        out_features=CLASSES,
        hidden_channels=((hidden,), (hidden,)),
        number_of_blocks_per_stage=1,
        nb_stages=2,
        inplanes=8,
        growing_conv_type=kind,
    )
    model.set_growing_layers(scheduling_method="all")
    return model, torch.randn(16, 3, 8, 8)


def vgg() -> tuple[nn.Module, Tensor]:
    model = VGG(
        [4, 4, 4, "M", 4, 4, "M"],
        [8, 8, 8, "M", 8, 8, "M"],
        num_classes=CLASSES,
        activation=nn.ReLU(),
        number_of_fc_layers=2,
        fc_layer_width=8,
        initial_fc_layer_width=6,
        input_spatial_shape=(8, 8),
        dropout=0.0,
    )
    return model, torch.randn(16, 3, 8, 8)


CONTAINERS: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "mlp": mlp,
    "restricted resnet": lambda: resnet(RestrictedConv2dGrowingModule),
    "full resnet": lambda: resnet(FullConv2dGrowingModule),
    "empty resnet": lambda: resnet(RestrictedConv2dGrowingModule, hidden=0),
    "vgg": vgg,
}


def found(
    name: str,
    precision: torch.dtype,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    around_updates: Callable[[], Any] = contextlib.nullcontext,
) -> dict[str, list[Tensor]]:
    """One growth step of a container: what its layers find, and what it computes before and after the change."""
    torch.manual_seed(0)
    model, x = CONTAINERS[name]()
    model, x, y = model.to(precision), x.to(precision), torch.arange(16) % CLASSES
    solved_in = torch.promote_types(precision, torch.float32)
    model.init_computation()
    for _ in range(2):
        model.zero_grad()
        with autocast():
            out = model(x)
        nn.functional.cross_entropy(out.to(solved_in), y).backward()
        with around_updates():
            model.update_computation()
    with around_updates():
        model.compute_optimal_updates(maximum_added_neurons=3, dtype=solved_in)
    model.reset_computation()
    layers = [getattr(layer, "second_layer", layer) for layer in model._growing_layers]
    result = {"improvement": [torch.stack([layer.first_order_improvement.detach().double() for layer in layers])]}
    result["update"] = [each.weight.detach().double() for layer in layers if (each := layer.optimal_delta_layer)]
    result["neurons"] = []  # Σ α ωᵀ, which knows no signs
    for layer in layers:
        alpha = layer.previous_module.extended_output_layer.weight.detach().double()
        omega = layer.extended_input_layer.weight.detach().double().transpose(0, 1)
        result["neurons"].append(alpha.flatten(1).T @ omega.flatten(1))
    model.select_update(0)
    model.currently_updated_layer.set_scaling_factor(0.5)
    model.eval()
    with torch.no_grad(), autocast():
        extended = model.extended_forward(x)
        result["extended"] = [(extended[0] if isinstance(extended, tuple) else extended).double()]
        model.apply_change()
        result["applied"] = [model(x).double()]
    return result


def assert_close(one: list[Tensor], other: list[Tensor], tolerance: float) -> None:
    assert len(one) == len(other) > 0
    for each, each0 in zip(one, other, strict=True):
        assert (each - each0).norm() <= tolerance * each0.norm()


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        expected = found(name, torch.float64)
        with accelerate():
            accelerated = found(name, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    for each in ("improvement", "update", "neurons"):
        if expected[each]:
            assert_close(accelerated[each], expected[each], 1e-7)
    assert_close(accelerated["applied"], accelerated["extended"], 1e-9)


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize(
    "how",
    [(torch.bfloat16,), (torch.float32, bfloat16), (torch.float32, bfloat16, bfloat16)],
    ids=["bfloat16", "autocast", "autocast around the updates too"],
)
def test_half_precision(name: str, how: tuple[Any, ...]) -> None:
    """Gromo multiplies float32 by bfloat16 and raises; here the sums are float32, as near as the inputs allow."""
    if len(how) < 3:
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            found(name, *how)
    with accelerate():
        expected = found(name, torch.float32)
        half = found(name, *how)
    assert_close(half["improvement"], expected["improvement"], 0.1)
    assert_close(half["applied"], half["extended"], 0.03)
