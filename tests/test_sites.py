"""Where networks can grow: exact lists of sites, and what may lie between two layers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, FAMILIES, mlp, net, texts
from torch import Tensor, nn

import growkern as gk
from growkern import GrowthSite
from growkern.between import resolve as resolve_between

pytestmark = pytest.mark.usefixtures("one_thread")


def between(call: Callable[[Tensor], Tensor], *, maps: bool = False, reads: int = 8) -> list[str]:
    """Sites of a -> call -> b, for linear layers or a convolution ahead of a linear layer."""
    layers = {"a": nn.Conv2d(3, 8, 3) if maps else nn.Linear(6, 8), "b": nn.Linear(reads, 2)}
    x = torch.randn(4, 3, 8, 8) if maps else torch.randn(4, 5, 6)
    return texts(net(lambda self, x: self.b(call(self.a(x))), **layers), x)


# Families of networks -----------------------------------------------------------------------------------

EXPECTED = {
    "mlp": ["0 -> 1 -> 2 -> 3", "3 -> 4 -> 5 -> 6"],
    "vgg": ["0 -> 1 -> 2 -> 3 -> 4", "4 -> 5 -> 6 -> 7 -> 8 -> 9 -> 10", "10 -> 11 -> 12"],
    "resnet": [f"block{i}.conv1 -> block{i}.bn1 -> block{i}.relu -> block{i}.conv2" for i in (1, 2)],
    "bottleneck": [
        f"block{i}.conv{j} -> block{i}.bn{j} -> block{i}.relu -> block{i}.conv{j + 1}" for i in (1, 2) for j in (1, 2)
    ],
    "flatten": ["conv -> relu() -> avg_pool2d(kernel_size=2, stride=1) -> flatten(start_dim=1) -> fc"],
    "transformer": ["layer.linear1 -> relu() -> layer.dropout -> layer.linear2"],
    "torchvision vit": [" -> ".join(f"encoder.layers.encoder_layer_{i}.mlp.{j}" for j in range(4)) for i in range(2)],
    "torchvision resnet18": [
        " -> ".join(f"layer{i}.{j}.{name}" for name in ("conv1", "bn1", "relu", "conv2"))
        for i in range(1, 5)
        for j in range(2)
    ],
    "torchvision vgg11": [
        *(
            "features.0 -> features.1 -> features.2 -> features.3",
            "features.3 -> features.4 -> features.5 -> features.6",
        ),
        *("features.6 -> features.7 -> features.8", "features.8 -> features.9 -> features.10 -> features.11"),
        *("features.11 -> features.12 -> features.13", "features.13 -> features.14 -> features.15 -> features.16"),
        "features.16 -> features.17 -> features.18",
        "features.18 -> features.19 -> features.20 -> avgpool -> flatten(start_dim=1) -> classifier.0",
        "classifier.0 -> classifier.1 -> classifier.2 -> classifier.3",
    ],
}


@pytest.mark.parametrize("name", ALL)
def test_families(name: str) -> None:
    family = FAMILIES[name]
    assert texts(family.build(), torch.randn(2, *family.sample)) == EXPECTED[name]


@pytest.mark.check("torchvision families")
def test_torchvision_resnet50_grows_inside_its_bottlenecks() -> None:
    model = pytest.importorskip("torchvision").models.resnet50()
    steps = (("conv1", "bn1", "relu", "conv2"), ("conv2", "bn2", "relu", "conv3"))
    expected = [
        " -> ".join(f"layer{i + 1}.{j}.{name}" for name in step)
        for i, blocks in enumerate((3, 4, 6, 3))
        for j in range(blocks)
        for step in steps
    ]
    assert texts(model, torch.randn(1, 3, 32, 32)) == expected


@pytest.mark.check("torchvision families")
def test_torchvision_encoder_block() -> None:
    vision_transformer = pytest.importorskip("torchvision").models.vision_transformer
    block = vision_transformer.EncoderBlock(2, 8, 12, 0.0, 0.0)
    assert texts(block, torch.randn(2, 5, 8)) == ["mlp.0 -> mlp.1 -> mlp.2 -> mlp.3"]


def test_site_knows_its_parts() -> None:
    site = gk.find_sites(mlp(), torch.randn(2, 6))[0]
    assert site == GrowthSite("0", "3", ("1", "2"))
    assert site.name == "0"


# Transformers of torch.nn -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("activation", "step"),
    [
        ("relu", "relu()"),
        ("gelu", "gelu()"),
        (F.gelu, "gelu()"),
        (torch.tanh, "tanh()"),
        (nn.SiLU(), "0.activation"),
    ],
    ids=["relu", "gelu", "function", "builtin", "module"],
)
def test_transformer_encoder_layer(activation: Any, step: str, batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, activation, norm_first=norm_first, batch_first=batch_first)
    sites = gk.find_sites(nn.Sequential(layer, nn.Linear(8, 2)), torch.randn(3, 5, 8))
    assert sites == [GrowthSite("0.linear1", "0.linear2", (step, "0.dropout"))]


def test_transformer_encoder_and_decoder() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = ("linear1", "dropout", "linear2")
    first, second = ([f"0.layers.{i}.{name}" for name in names] for i in range(2))
    assert gk.find_sites(nn.Sequential(encoder, nn.Linear(8, 2)), torch.randn(3, 5, 8)) == [
        GrowthSite(first[0], first[2], ("relu()", first[1])),
        GrowthSite(second[0], second[2], ("relu()", second[1])),
    ]
    both = net(lambda self, x, y: self.t(x, y), t=nn.Transformer(8, 2, 1, 1, 12, batch_first=True))
    assert [site.name for site in gk.find_sites(both, (torch.randn(3, 5, 8), torch.randn(3, 4, 8)))] == [
        "t.encoder.layers.0.linear1",
        "t.decoder.layers.0.linear1",
    ]


def test_transformer_with_an_activation_that_has_no_name(caplog: pytest.LogCaptureFixture) -> None:
    activation = functools.partial(F.gelu, approximate="tanh")
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation=activation, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with caplog.at_level(logging.INFO, "growkern.sites"):
        assert texts(model, torch.randn(3, 5, 8))[-1] == "1 -> 2 -> 3"


# What may lie between -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "step"),
    [
        (F.relu, "relu()"),
        (lambda y: F.relu(y, inplace=True), "relu()"),
        (lambda y: y.relu(), "relu()"),
        (lambda y: y.relu_(), "relu()"),
        (torch.tanh, "tanh()"),
        (lambda y: y.tanh(), "tanh()"),
        (F.silu, "silu()"),
        (F.mish, "mish()"),
        (F.hardswish, "hardswish()"),
        (F.selu, "selu()"),
        (lambda y: F.gelu(y, approximate="tanh"), "gelu(approximate='tanh')"),
        (lambda y: F.leaky_relu(y, 0.2), "leaky_relu(negative_slope=0.2)"),
        (lambda y: F.elu(y, 0.5, True), "elu(alpha=0.5)"),
        (lambda y: F.dropout(F.relu(y), 0.3, True), "relu() -> dropout()"),
        (lambda y: y.contiguous().relu(), "contiguous() -> relu()"),
        (lambda y: y, None),
    ],
)
def test_functional_activations(call: Callable[[Tensor], Tensor], step: str | None) -> None:
    assert between(call) == [f"a -> {step} -> b" if step else "a -> b"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        *(((), True), (("relu()",), True), (("leaky_relu(negative_slope=0.2)",), True), (("relu()", "relu()"), True)),
        *((("relu6()",), False), (("hardtanh()",), False), (("gelu()",), False)),
        *((("relu()", "tanh()"), False), (("max_pool2d(kernel_size=2)", "relu()"), True)),
    ],
)
def test_which_activations_keep_a_scale(steps: tuple[str, ...], expected: bool) -> None:
    assert resolve_between(nn.Identity(), steps).homogeneous is expected


FLATTEN = "flatten(start_dim=1)"


@pytest.mark.parametrize(
    ("call", "reads", "step"),
    [
        (lambda y: y.view(y.size(0), -1), 288, FLATTEN),
        (lambda y: y.reshape(y.shape[0], -1), 288, FLATTEN),
        (lambda y: y.view(y.shape[0], y.shape[1] * y.shape[2] * y.shape[3]), 288, FLATTEN),
        (lambda y: torch.flatten(y, 1), 288, FLATTEN),
        (lambda y: y.flatten(1), 288, FLATTEN),
        (lambda y: y.flatten(start_dim=1), 288, FLATTEN),
        (lambda y: y.mean((2, 3)), 8, "mean(dim=(2, 3))"),
        (lambda y: torch.mean(y, dim=(-1, -2)), 8, "mean(dim=(-1, -2))"),
        (lambda y: y.mean((2, 3), keepdim=True).flatten(1), 8, f"mean(dim=(2, 3), keepdim=True) -> {FLATTEN}"),
        (lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1), 8, f"adaptive_avg_pool2d(output_size=1) -> {FLATTEN}"),
        (
            lambda y: F.adaptive_max_pool2d(y, 2).flatten(1),
            32,
            f"adaptive_max_pool2d(output_size=2, return_indices=False) -> {FLATTEN}",
        ),
        (
            lambda y: F.max_pool2d(y, 3, 2).flatten(1),
            32,
            "max_pool2d(kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False, return_indices=False)"
            f" -> {FLATTEN}",
        ),
        (lambda y: F.avg_pool2d(y, (3, 2)).flatten(1), 48, f"avg_pool2d(kernel_size=(3, 2)) -> {FLATTEN}"),
    ],
)
def test_flattening_and_pooling(call: Callable[[Tensor], Tensor], reads: int, step: str) -> None:
    assert between(lambda y: call(F.relu(y)), maps=True, reads=reads) == [f"a -> relu() -> {step} -> b"]


def test_a_view_that_fixes_the_number_of_features_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "growkern.sites"):
        assert between(lambda y: F.relu(y).view(-1, 8 * 6 * 6), maps=True, reads=288) == []
    assert "view(size=('-1', '288')) between two layers is not supported" in caplog.text


def test_pooling_by_the_size_of_the_map_is_a_site_or_says_why_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "growkern.sites"):
        found = between(lambda y: F.avg_pool2d(y, y.size()[2:]).flatten(1), maps=True)
    assert found == ["a -> avg_pool2d(kernel_size=(6, 6)) -> flatten(start_dim=1) -> b"] or "avg_pool2d" in caplog.text


def test_modules_between() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Dropout2d(), nn.Conv2d(4, 2, 3))
    assert texts(model, torch.randn(2, 3, 8, 8)) == ["0 -> 1 -> 2 -> 3 -> 4"]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.Identity(), nn.Conv2d(4, 2, 3))
    assert texts(model, torch.randn(2, 3, 8, 8)) == ["0 -> 1 -> 2 -> 3 -> 4"]
