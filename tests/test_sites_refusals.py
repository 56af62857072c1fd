"""What is no site, and which reason is given."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ResNet, net, texts
from torch import Tensor, nn

import growkern as gk

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(("wrap", "inner"), [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_a_wrapped_model_is_refused_with_the_way_in(wrap: Callable[[nn.Module], nn.Module], inner: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=f"pass model.{inner} instead"):
        gk.find_sites(wrap(model), torch.randn(3, 6))
    own = net(lambda self, x: getattr(self, inner)(x), **{inner: model})
    assert texts(own, torch.randn(3, 6)) == [f"{inner}.0 -> {inner}.1 -> {inner}.2"]
