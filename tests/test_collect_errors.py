"""Measuring what cannot be measured: the error names the cause and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, FAMILIES, assert_same, mlp, picture, vgg
from networks import Batches
from torch import Tensor, nn

import growkern as gk
from growkern import GrowthSite

pytestmark = pytest.mark.usefixtures("one_thread")

SITE = GrowthSite("0", "3", ("1", "2"))


def batch(n: int = 4) -> Batches:
    return [(torch.randn(n, 6), torch.randint(CLASSES, (n,)))]


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


def frozen_front() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    return model


def spoiled(value: float) -> Batches:
    pairs = batch() + batch()
    pairs[1][0][2, 3] = value
    return pairs


def nan_weight() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[6].weight[0, 0] = torch.nan
    return model


def twice() -> nn.Module:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    return Twice(*mlp())


def unused() -> nn.Module:
    class Unused(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[6](x[:, :1].expand(-1, 7))

    return Unused(*mlp())


def overwritten() -> nn.Module:
    class Overwritten(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[1](self[0](x))
            z = self[3](h)
            with torch.no_grad():
                h.zero_()
            return self[6](z.detach() + z.sum())

    return Overwritten(*mlp().requires_grad_(False).train()).requires_grad_()


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no batch": (mlp, {"batches": []}, "batches: .*none"),
    "exhausted generator": (mlp, {"batches": iter(())}, "batches: .*none"),
    "empty batch": (mlp, {"batches": batch(0)}, "batches"),
    "not a pair": (mlp, {"batches": [torch.randn(4, 6)]}, "batches: .*pairs"),
    "dict": (mlp, {"batches": [{"x": torch.randn(4, 6), "y": torch.zeros(4)}]}, "batches: .*pairs"),
    "triple": (mlp, {"batches": [(torch.randn(4, 6), torch.zeros(4), 1)]}, "batches: .*pairs, .* got tuple of 3"),
    "no batches": (mlp, {"batches": 5}, "batches: .*pairs, got int"),
    "nan input": (mlp, {"batches": spoiled(torch.nan)}, "batch 1|batches"),
    "inf input": (mlp, {"batches": spoiled(torch.inf)}, "batch 1|batches"),
    "nan weight": (nan_weight, {}, "loss_fn|batches"),
    "nan loss": (mlp, {"loss_fn": lambda z, y: z.mean() * torch.nan}, "loss_fn: .*nan"),
    "infinite loss": (mlp, {"loss_fn": lambda z, y: z.mean() / 0}, "loss_fn: .*inf"),
    "loss not scalar": (mlp, {"loss_fn": lambda z, y: z}, r"loss_fn: .*\(4, 4\)"),
    "loss not a tensor": (mlp, {"loss_fn": lambda z, y: z.mean().item()}, "loss_fn: .*float"),
    "loss detached": (mlp, {"loss_fn": lambda z, y: z.mean().detach()}, "loss_fn: no gradient"),
    "all frozen": (frozen, {}, "frozen"),
    "site frozen": (frozen_front, {}, "'0'.*frozen|'0'.*gradient"),
    "site not used by the loss": (unused, {}, "'0'.*did not call"),
    "no gradient back to the site": (
        mlp,
        {"loss_fn": lambda z, y: (z.detach() * torch.ones(1, requires_grad=True)).sum()},
        "'0'.*no gradient",
    ),
    "called twice": (twice, {}, "'0'.*more than once"),
    "overwritten": (overwritten, {}, "'0'.*in place"),
    "kernel": (mlp, {"kernel": "half"}, "kernel: .*full.*'half'"),
    "reduction": (mlp, {"reduction": "none"}, "reduction: .*mean.*'none'"),
    "negative draws": (mlp, {"null_draws": -1}, "null_draws: .*-1"),
    "draws of a float": (mlp, {"null_draws": 2.5}, r"null_draws: .*2\.5"),
    "no site": (mlp, {"sites": []}, "sites: .*none"),
    "a site twice": (mlp, {"sites": [SITE, SITE]}, "sites: expected one site for each producer, got 0, 0"),
    "unknown site": (mlp, {"sites": [GrowthSite("nowhere", "3")]}, "'nowhere'"),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(6, 4, 1, groups=2), nn.ReLU(), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        {},
        "'0'.*groups=2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_name_the_cause_and_change_nothing(name: str) -> None:
    build, options, message = CASES[name]
    model = build()
    arguments = {"sites": [SITE], "batches": batch(), "loss_fn": F.cross_entropy} | options
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        gk.collect(model, **arguments)
    assert_same(before, picture(model))


def test_site_that_is_not_a_site_is_refused() -> None:
    with pytest.raises(ValueError, match="sites: expected GrowthSite, got str"):
        gk.collect(mlp(), ["0"], batch(), F.cross_entropy)  # type: ignore[list-item]


@pytest.mark.parametrize(
    "site",
    [GrowthSite("0", "4", ("1", "2")), GrowthSite("4", "10", ("5", "9")), GrowthSite("4", "10", ("5", "6", "7", "8"))],
    ids=str,
)
def test_layers_that_a_site_forgets_are_noticed(site: GrowthSite) -> None:
    """A pool, or the flattening, that lies between by fact but not by name."""
    model = vgg()
    batches = FAMILIES["vgg"].batches(4)
    before = picture(model)
    with pytest.raises(ValueError, match=f"site {site.name!r}"):
        gk.collect(model, [site], batches, F.cross_entropy)
    assert_same(before, picture(model))


def test_center_has_no_meaning_ahead_of_flatten() -> None:
    model = FAMILIES["flatten"].build()
    batches = FAMILIES["flatten"].batches(4)
    sites = gk.find_sites(model, batches[0][0])
    before = picture(model)
    with pytest.raises(ValueError, match=r"kernel: 'center'.*'conv'"):
        gk.collect(model, sites, batches, F.cross_entropy, kernel="center")
    assert_same(before, picture(model))
