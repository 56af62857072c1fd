"""How models are called to find sites, and sites named by hand where that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, FAMILIES, assert_same, close, mlp, net, picture, texts
from networks import asserting
from torch import Tensor, nn

import growkern as gk
from growkern import GrowthSite

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_assertions_are_no_branches() -> None:
    assert texts(asserting(), torch.randn(4, 6)) == ["a -> relu() -> b"]
    with pytest.raises(RuntimeError, match="could not trace"):
        gk.find_sites(asserting(branches=True), torch.randn(4, 6))


class Branching(nn.Module):
    """No trace: the forward pass branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = -x if x.sum() > 1e9 else x
        return self.fc2(F.relu(self.fc1(x)))


def test_subclasses_that_change_no_forward_are_layers_too() -> None:
    class Started(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            nn.init.orthogonal_(self.weight)

    class Norm(nn.BatchNorm1d):
        pass

    model, x = nn.Sequential(Started(6, 8), Norm(8), nn.ReLU(), Started(8, CLASSES)), torch.randn(50, 6)
    assert texts(model, x) == ["0 -> 1 -> 2 -> 3"]
    event = gk.Grower(model, None, F.cross_entropy, neurons=2).step([(x, torch.randint(CLASSES, (50,)))])
    assert event.widths == {"0": 8 + event.neurons}


class Adapted(nn.Linear):
    """A layer with a low-rank correction, which would not fit any more."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down, self.up = nn.Linear(sizes[0], 2, bias=False), nn.Linear(2, sizes[1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: nn.Sequential(Adapted(6, 8), nn.ReLU(), nn.Linear(8, 4)),
            "0 is of class Adapted with a forward of its own",
        ),
        (lambda: nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 4)), "growing starts from one unit"),
        (lambda: mlp().to("meta"), "model: its parameters are on the meta device"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_that_cannot_grow_are_refused_by_name(build: Callable[[], nn.Module], message: str) -> None:
    batches = [(torch.randn(8, 6), torch.randint(CLASSES, (8,)))]
    with pytest.raises(ValueError, match=message):
        gk.collect(build(), GrowthSite("0", "2", ("1",)), batches, F.cross_entropy)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_compiled_scripts_are_refused_with_the_way_in() -> None:
    with pytest.raises(ValueError, match="pass the module that it was made of"):
        gk.find_sites(torch.jit.script(mlp()), torch.randn(4, 6))


def test_names_are_text_and_between_is_a_tuple() -> None:
    assert GrowthSite("a", "b", ["relu()"]) == GrowthSite("a", "b", ("relu()",))  # type: ignore[arg-type]
    for arguments in (("a", "b", "relu()"), (nn.Linear(2, 2), "b"), ("a", "b", (nn.ReLU(),)), ("a", "b", None)):
        with pytest.raises(ValueError, match=r"GrowthSite: expected two names and a tuple of names such as"):
            GrowthSite(*arguments)  # type: ignore[arg-type]


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
    with pytest.raises(
        ValueError, match=r"evaluation mode fails when called as model\(Tensor\(4, 5\)\): RuntimeError: mat1 and mat2"
    ):
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
