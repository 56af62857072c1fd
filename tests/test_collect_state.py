"""Measuring leaves the model, the random stream and the memory as they were."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import F64, FAMILIES, SMALL, assert_same, close, mlp, picture
from networks import at
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import growkern as gk
import growkern.passes
from growkern import GrowthSite
from growkern.eval_mode import fixed_norms
from growkern.passes import Recording

pytestmark = pytest.mark.usefixtures("one_thread")


class Fails(nn.Module):
    """Passes its input on until told to fail, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.when = [0], ""

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        if self.when == "forward" and self.calls[0] == 2:
            raise ArithmeticError("forward")
        if self.when == "backward" and self.calls[0] == 2:
            x = x * 1
            x.register_hook(self._fail)
        return x

    def _fail(self, gradient: Tensor) -> None:
        raise ArithmeticError("backward")


@pytest.mark.parametrize("when", ["", "forward", "backward", "loss"])
@pytest.mark.parametrize("grads", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", SMALL)
def test_model_is_left_as_it_was(name: str, grads: bool, when: str) -> None:
    family = FAMILIES[name]
    model = nn.Sequential(family.build(), Fails())
    batches = family.batches(4, 5, 3)
    sites = gk.find_sites(model, batches[0][0])
    if grads:
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    next(m for m in model[0].modules() if isinstance(m, nn.Linear | nn.Conv2d)).eval()
    model[1].when, model[1].calls = when, [0]

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        if when == "loss" and len(y) == 3:
            raise ArithmeticError("loss")
        return F.cross_entropy(z, y)

    before = picture(model)
    if when:
        with pytest.raises(ArithmeticError, match=when):
            gk.collect(model, sites, batches, loss_fn)
    else:
        gk.collect(model, sites, batches, loss_fn)
    assert_same(before, picture(model))
    assert model.training


def test_dropout_is_off_and_the_random_stream_goes_on() -> None:
    model = mlp()
    batches = FAMILIES["mlp"].batches(16, 16)
    state = torch.get_rng_state()
    first = at(model, batches, F.cross_entropy)
    torch.rand(3)
    again = at(model, batches, F.cross_entropy)
    for key, value in first.tensors().items():
        assert torch.equal(getattr(again, key), value), key
    torch.set_rng_state(state)
    at(model, batches, F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("passes", [1, 2])
def test_no_graph_is_kept(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after measuring nor, of the batch before, while the next one runs."""
    if passes == 2:
        monkeypatch.setattr(Recording, "add", lambda *_: None)
    model = FAMILIES["resnet"].build()
    batches = FAMILIES["resnet"].batches(4, 4, 4)
    sites = gk.find_sites(model, batches[0][0])
    alive: list[weakref.ref[Any]] = []
    left_over: list[int] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        alive.append(weakref.ref(out))

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        left_over.append(sum(ref() is not None for ref in alive))

    model.register_forward_pre_hook(look)
    model.block1.conv2.register_forward_hook(remember)
    gc.collect()
    gc.disable()
    try:
        gk.collect(model, sites, batches, F.cross_entropy)
        left_over.append(sum(ref() is not None for ref in alive))
    finally:
        gc.enable()
    assert len(alive) == 3 * passes
    assert left_over == [0] * len(left_over)


class Counts(nn.Module):
    """Calls another model, if it is to on a copy of the batch in a place that the next one is written to as well."""

    def __init__(self, model: nn.Module, reuses: bool) -> None:
        super().__init__()
        self.model, self.reuses, self.calls, self.place = model, reuses, 0, torch.zeros(40, 6, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(self.place[: len(x)].copy_(x) if self.reuses else x)


@pytest.mark.parametrize(("room", "reuses", "passes"), [(2**20, False, 1), (2**20, True, 2), (-7, False, 2)])
def test_models_run_once_where_there_is_room_for_what_sites_see(
    room: int, reuses: bool, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But twice where they write to it; the moments are the same."""
    model = Counts(mlp().double(), reuses)
    batches = FAMILIES["mlp"].batches(40, 30, dtype=F64)
    sites = [
        GrowthSite(f"model.{each.producer}", f"model.{each.consumer}", tuple(f"model.{b}" for b in each.between))
        for each in gk.find_sites(model.model, batches[0][0])
    ]
    monkeypatch.setattr(growkern.passes, "_SUMS", room)  # sizes of N, besides 8 for draws
    found = gk.collect(model, sites, batches, F.cross_entropy)
    assert model.calls == 2 * passes
    monkeypatch.setattr(Recording, "add", lambda *_: None)
    for name, moments in gk.collect(model, sites, batches, F.cross_entropy).items():
        for key, value in moments.tensors().items():
            close(found[name].tensors()[key], value, 1e-12)
    assert model.calls == 2 * passes + 4


def test_what_was_seen_goes_with_the_graph() -> None:
    """While the gradient is on its way to the first block, the last one is measured, and its maps are gone."""
    model = FAMILIES["resnet"].build()
    maps: list[Any] = []
    left: list[list[bool]] = []

    def remember(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        maps.append(weakref.ref(args[0].untyped_storage()))
        if len(maps) == 1:
            out.register_hook(lambda _: left.append([ref() is not None for ref in maps]))

    batches = FAMILIES["resnet"].batches(4)
    sites = gk.find_sites(model, batches[0][0])
    model.block1.conv2.register_forward_hook(remember)
    model.block2.conv2.register_forward_hook(remember)
    gk.collect(model, sites, batches, F.cross_entropy, kernel="center", null_draws=0)
    assert left == [[True, False]]


@pytest.mark.parametrize("affine", [True, False])
def test_fixed_norms_hold_nothing(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=affine)).double()
    model(torch.randn(5, 2, 7, 7, dtype=F64))
    x = torch.randn(4, 2, 6, 6, dtype=F64, requires_grad=True)
    expected = torch.autograd.grad(model.eval()(x).sin().sum(), x)[0]
    with fixed_norms(model):
        out = model(x)
    assert out.grad_fn._saved_tensor1 is None  # of x·scale: what the norm reads
    close(torch.autograd.grad(out.sin().sum(), x)[0], expected)
    assert "forward" not in vars(model[1])
    with fixed_norms(model.train()):
        assert out.grad_fn.name() != model(x).grad_fn.name()


def test_checkpointed_blocks() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model = FAMILIES["resnet"].build().double()
    batches = FAMILIES["resnet"].batches(4, 5, dtype=F64)
    expected = gk.collect(model, gk.find_sites(model, batches[0][0]), batches, F.cross_entropy)
    model.block1, model.block2 = Checkpointed(model.block1), Checkpointed(model.block2)

    def moved(name: str) -> str:
        return name.replace("block1", "block1.inner").replace("block2", "block2.inner")

    sites = [
        GrowthSite(moved(m.site.producer), moved(m.site.consumer), tuple(map(moved, m.site.between)))
        for m in expected.values()
    ]
    before = picture(model)
    found = gk.collect(model, sites, batches, F.cross_entropy)
    assert_same(before, picture(model))
    for name, moments in expected.items():
        for key, value in moments.tensors().items():
            close(getattr(found[moved(name)], key), value, 1e-9)
