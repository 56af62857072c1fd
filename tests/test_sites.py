"""Where networks can grow: exact lists of sites, and what is left out for which reason."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, CLASSES, FAMILIES, ResNet, assert_same, close, mlp, picture
from torch import Tensor, nn

import growkern as gk
from growkern import GrowthSite

pytestmark = pytest.mark.usefixtures("one_thread")


def net(forward: Callable[..., Any], **layers: nn.Module) -> nn.Module:
    """A module with these layers and this forward(self, ...)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

    Net.forward = forward
    return Net()


def texts(model: nn.Module, *inputs: Any) -> list[str]:
    return [str(site) for site in gk.find_sites(model, inputs if len(inputs) > 1 else inputs[0])]


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


# What is no site ----------------------------------------------------------------------------------------


def shared_module() -> nn.Module:
    return net(lambda self, x: self.c(F.relu(self.b(F.relu(self.b(self.a(x)))))), **_three())


def shared_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    model[2].weight = model[0].weight
    return model


def shared_bias() -> nn.Module:
    """Growing the producer would tear its bias from the other layer, in model and optimizer."""
    model = net(
        lambda self, x: self.b(F.relu(self.a(x))) + self.other(x),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 8),
        other=nn.Linear(6, 8),
    )
    model.other.bias = model.a.bias
    return model


def shared_norm() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x))) + self.b2(self.norm(self.a2(x)))

    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 2), "a2": nn.Linear(6, 8), "b2": nn.Linear(8, 2)}
    return net(forward, norm=nn.BatchNorm1d(8), **layers)


def read_by_itself() -> nn.Module:
    """The forward pass reads the producer's weight by itself too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) + F.linear(x[..., :4], self.a.weight[:2, :4])

    return net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 2))


def parametrized(index: int, how: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    getattr(nn.utils.parametrizations, how)(model[index])
    return model


def pruned() -> nn.Module:
    import torch.nn.utils.prune as prune

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    prune.random_unstructured(model[0], "weight", 0.3)
    return model


def _three() -> dict[str, nn.Module]:
    return {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 2)}


def _linear(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 2))


def _conv(*between: nn.Module, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 8, 3, **options), *between, nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize(
    ("build", "sample", "reason"),
    [
        (lambda: _linear(nn.Sigmoid()), (6,), r"0\.5 at 0"),
        (lambda: _linear(nn.Softplus()), (6,), r"0\.693 at 0"),
        (lambda: net(lambda self, x: self.c(torch.sigmoid(self.a(x))), **_three()), (6,), r"0\.5 at 0"),
        (lambda: _linear(nn.Hardshrink()), (6,), "flat at 0"),
        (lambda: _linear(nn.Softmax(-1)), (6,), "Softmax"),
        (lambda: _linear(nn.PReLU(8)), (6,), "PReLU"),
        (lambda: net(lambda self, x: self.c(F.glu(self.b(x))), b=nn.Linear(6, 16), c=nn.Linear(8, 2)), (6,), "glu"),
        (lambda: net(lambda self, x: self.c(self.b(x) * 2), b=nn.Linear(6, 8), c=nn.Linear(8, 2)), (6,), "mul"),
        (lambda: _linear(nn.LayerNorm(8)), (6,), "LayerNorm"),
        (lambda: _linear(nn.ReLU(), nn.BatchNorm1d(8)), (6,), "before activations"),
        (lambda: _linear(nn.BatchNorm1d(8, affine=False)), (6,), "without weights"),
        (lambda: _linear(nn.BatchNorm1d(8, track_running_stats=False)), (6,), "running statistics"),
        # On (batch, tokens, features) these two normalise the tokens, not the units.
        (lambda: _linear(nn.BatchNorm1d(5)), (5, 6), "norm|Norm"),
        (lambda: _linear(nn.BatchNorm1d(8)), (8, 6), "norm|Norm"),
        (lambda: _linear(nn.GroupNorm(5, 5)), (5, 6), "norm|Norm"),
        (lambda: _conv(nn.ReLU(), groups=2), (6, 8, 8), "groups=2"),
        (lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), (6, 8, 8), "groups=8"),
        (lambda: _conv(nn.ReLU(), padding=1, padding_mode="reflect"), (6, 8, 8), "padding_mode='reflect'"),
        (lambda: _conv(nn.MaxPool2d(3, dilation=2)), (6, 12, 12), "dilation=2"),
        (shared_module, (6,), "called more than once"),
        (shared_weight, (6,), "shared"),
        (shared_bias, (6,), "bias"),
        (shared_norm, (6,), "called more than once"),
        (read_by_itself, (6,), "weight"),
        (pruned, (6,), "computed"),
        (lambda: parametrized(0, "weight_norm"), (6,), "parametriz"),
        (lambda: parametrized(2, "weight_norm"), (6,), "parametriz"),
        (lambda: parametrized(2, "orthogonal"), (6,), "parametriz"),
    ],
)
def test_left_out_with_a_reason(
    build: Callable[[], nn.Module], sample: tuple[int, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "growkern.sites"):
        assert texts(build(), torch.randn(4, *sample)) == []
    assert caplog.records, "left out without a reason"
    assert re.search(reason, caplog.text), caplog.text
    assert {record.name for record in caplog.records} == {"growkern.sites"}


def test_residual_streams_are_no_sites_and_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "growkern.sites"):
        gk.find_sites(ResNet(True), torch.randn(2, 3, 8, 8))
        assert (
            texts(net(lambda self, x: self.c(x + self.a(x)), a=nn.Linear(6, 6), c=nn.Linear(6, 2)), torch.randn(2, 6))
            == []
        )
    assert caplog.records == []


def test_hidden_units_that_something_else_reads_are_no_site() -> None:
    def returned(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.a(x))
        return hidden, self.b(hidden)

    def twice(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.b(hidden) + hidden.sum()

    for forward in (returned, twice):
        assert texts(net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 2)), torch.randn(2, 6)) == []


def test_shapes_may_be_read_of_hidden_units() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        torch._assert(hidden.dim() == 2, "two dimensions")
        return self.b(hidden) / hidden.shape[0]

    assert texts(net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 2)), torch.randn(2, 6)) == ["a -> relu() -> b"]


# How models are called ----------------------------------------------------------------------------------


def test_forward_with_more_arguments() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, extra: Any = None) -> Tensor:
        x = x if mask is None else x * mask
        if extra is not None:
            raise AssertionError
        return self.b(F.relu(self.a(x))) * scale

    model = net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 2))
    x = torch.randn(4, 6)
    assert texts(model, x) == ["a -> relu() -> b"]
    assert texts(model, x, torch.ones(6)) == ["a -> relu() -> b"]
    moments = gk.collect(model, gk.find_sites(model, x), [(x, None)], lambda y, _: y.square().mean())
    assert moments["a"].count == 4


def test_branches_on_the_mode_follow_evaluation() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.b(hidden) + (hidden.sum() if self.training else 0)

    model = net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 2))
    assert texts(model, torch.randn(2, 6)) == ["a -> relu() -> b"]
    assert model.training


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "transformer"])
def test_nothing_changes(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    list(model.modules())[1].eval()
    before = picture(model)
    gk.find_sites(model, torch.randn(4, *family.sample, generator=torch.Generator().manual_seed(1)))
    assert_same(before, picture(model))


class Branching(nn.Module):
    """No trace: the forward pass branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = -x if x.sum() > 1e9 else x
        return self.fc2(F.relu(self.fc1(x)))


def test_untraceable_model_says_how_to_name_sites() -> None:
    model = Branching()
    before = picture(model)
    with pytest.raises(RuntimeError, match="GrowthSite") as error:
        gk.find_sites(model, torch.randn(4, 6, generator=torch.Generator()))
    assert "between" in str(error.value)
    assert "Branching" in str(error.value)
    assert_same(before, picture(model))


def test_untraceable_model_grows_at_a_site_named_by_hand() -> None:
    model, x, target = Branching().double(), torch.randn(16, 6, dtype=torch.float64), torch.randint(CLASSES, (16,))
    site = GrowthSite("fc1", "fc2", between=("relu()",))
    new = gk.solve(gk.collect(model, [site], [(x, target)], F.cross_entropy)["fc1"], neurons=2, paired=True)
    expected = model(x) + (x @ new.alpha[0, :6] + new.alpha[0, 6])[:, None] * new.omega[:, 0] * 0.3
    gk.apply(model, new, scale=0.3)
    assert model.fc1.out_features == 10
    close(model(x), expected)  # relu(t) − relu(−t) = t


def test_model_that_does_not_run_on_its_inputs() -> None:
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|GrowthSite"):
        gk.find_sites(mlp(), torch.randn(4, 5))


def test_bare_transformer_layer_says_how_to_name_its_site() -> None:
    """Its own forward branches on values; wrapped in a model it is not traced into."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    with pytest.raises(RuntimeError, match="GrowthSite"):
        gk.find_sites(layer, torch.randn(2, 5, 8))
    batches = [(torch.randn(2, 5, 8), None)]
    site = GrowthSite("linear1", "linear2", ("relu()", "dropout"))
    assert gk.collect(layer, [site], batches, lambda y, _: y.square().mean())["linear1"].count == 10


# Sites named by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (GrowthSite("nowhere", "3", ("1",)), "nowhere"),
        (GrowthSite("0", "nowhere", ("1",)), "nowhere"),
        (GrowthSite("0", "3", ("nowhere",)), "nowhere"),
        (GrowthSite("0", "1"), "1 is a ReLU"),
        (GrowthSite("0", "6", ("1",)), "reads 7"),
        (GrowthSite("0", "3", ("relu",)), "relu"),
        (GrowthSite("0", "3", ("relu(",)), r"relu\("),
        (GrowthSite("0", "3", ("relu(x)",)), "named constants"),
        (GrowthSite("0", "3", ("warp()",)), r"warp\(\)"),
        (GrowthSite("0", "3", ("flatten(start_dim=1)",)), "Linear producer"),
        (GrowthSite("0", "3", ("gelu(approximate='none', wrong=1)",)), "gelu"),
    ],
    ids=str,
)
def test_wrong_site_is_named(site: GrowthSite, message: str) -> None:
    model = mlp()
    before = picture(model)
    with pytest.raises(ValueError, match=message) as error:
        gk.collect(model, [site], [(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))], F.cross_entropy)
    assert f"site {site.name!r}" in str(error.value)
    assert_same(before, picture(model))


def test_site_cannot_be_its_own_consumer() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    with pytest.raises(ValueError, match="'0'"):
        gk.collect(
            model, [GrowthSite("0", "0")], [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))], F.cross_entropy
        )


def test_hand_named_site_reads_like_a_found_one() -> None:
    """A functional call, a module and a found site give the same moments."""
    model = net(
        lambda self, x: self.b(self.act(self.a(x))), a=nn.Linear(6, 8), act=nn.GELU(), b=nn.Linear(8, CLASSES)
    ).double()
    batches = [(torch.randn(9, 6, dtype=torch.float64), torch.randint(CLASSES, (9,)))]
    found = gk.find_sites(model, batches[0][0])
    by_hand = [GrowthSite("a", "b", ("gelu()",))]
    one, other = (gk.collect(model, sites, batches, F.cross_entropy)["a"] for sites in (found, by_hand))
    assert (one.slope, one.smooth) == (other.slope, other.smooth)
    assert one.slope == pytest.approx(0.5, abs=1e-4)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, getattr(other, name)), name
