"""Measuring in any precision and memory format, from generators, loaders and several inputs."""

from __future__ import annotations

import copy
from collections import defaultdict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, F64, FAMILIES, close, mlp, vgg
from torch import Tensor, nn

import growkern as gk
from growkern import GrowthSite, ops
from growkern.batches import to_device
from growkern.probe import Seen

pytestmark = pytest.mark.usefixtures("one_thread")

# Precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "vgg", "transformer"])
def test_precisions(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().double()
    batches = family.batches(40, 30, dtype=F64)
    single = [(x.float(), y) for x, y in batches]
    site = gk.find_sites(model, batches[0][0])[0]
    double = gk.collect(model, [site], batches, F.cross_entropy)[site.name]
    model.float()
    plain = gk.collect(model, [site], single, F.cross_entropy)[site.name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = gk.collect(model, [site], single, F.cross_entropy)[site.name]
    for key, value in double.tensors().items():
        assert value.dtype == F64
        if key != "update":  # dW* is solved for in float64
            assert getattr(plain, key).dtype == getattr(half, key).dtype == torch.float32
        if key in ("xx", "xv", "hh", "hv", "vv", "x_mean", "x_second"):
            error = (getattr(plain, key) - value).norm() / value.norm()
            assert error < 2e-5, (key, error)
            error = (getattr(half, key) - value).norm() / value.norm()
            assert error < 0.05, (key, error)


def test_channels_last_and_in_place_models_measure_the_same() -> None:
    model = vgg().double()
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    batches = FAMILIES["vgg"].batches(90, dtype=F64)
    last = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
    sites = gk.find_sites(model, batches[0][0])
    one, other = (gk.collect(m, sites, b, F.cross_entropy) for m, b in ((model, batches), (apart, last)))
    for name in one:
        for key, value in one[name].tensors().items():
            close(getattr(other[name], key), value, 1e-9)


# Batches -------------------------------------------------------------------------------------------------


def test_generator_is_read_once_and_both_passes_see_the_same() -> None:
    """N, from the second pass, is what xv − xh hh⁺ hv gives from the first."""
    model = mlp().double()
    site = gk.find_sites(model, torch.zeros(2, 6, dtype=F64))[0]
    made: list[int] = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for n in (30, 20):
            made.append(n)
            yield torch.randn(n, 6, dtype=F64), torch.randint(CLASSES, (n,))

    moments = gk.collect(model, [site], stream(), F.cross_entropy, null_draws=2)["0"]
    assert made == [30, 20]
    assert moments.count == 50
    expected = moments.xv - moments.xh @ torch.linalg.solve(moments.hh, moments.hv)
    close(moments.xr, expected, 1e-8)


class Reuses(nn.Module):
    """Convolutions that read a place in memory which every batch is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 50, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.place = torch.zeros(4, 3, 6, 6, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        read = self.place[: len(x), :, : x.shape[2]].copy_(x)
        return self.b(F.avg_pool2d(F.relu(self.norm(self.a(read))), 2)).sum((2, 3))


@pytest.mark.parametrize(("kernel", "numbers"), [("full", Seen.numbers), ("center", 0)])
def test_few_samples_wait_for_more_that_fit(kernel: str, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that five batches of maps of two sizes are summed in two calls, to what they are one by one."""
    calls: list[int] = []
    together = ops.moments.grouped_moments
    monkeypatch.setattr(ops.moments, "grouped_moments", lambda some: calls.append(len(some)) or together(some))
    model = Reuses().double()
    site = GrowthSite("a", "b", ("norm", "relu()", "avg_pool2d(kernel_size=2)"))
    batches = [(torch.randn(n, 3, size, 6, dtype=F64), None) for n, size in ((4, 6), (3, 6), (1, 6), (2, 4), (4, 4))]
    found = []
    for number, sums in ((numbers, 2), (2**30, 5)):
        monkeypatch.setattr(Seen, "numbers", number)
        calls.clear()
        found.append(gk.collect(model, [site], batches, lambda z, _: z.pow(4).sum() / len(z), kernel=kernel)["a"])
        assert len(calls) == sums
    for key, value in found[0].tensors().items():
        close(value, found[1].tensors()[key], 1e-10)


def test_loader_and_several_inputs() -> None:
    """A DataLoader gives lists; an input that is a list or tuple holds several arguments."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x + shift)))

    model, x, shift, y = Two(), torch.randn(12, 6), torch.randn(12, 6), torch.randint(CLASSES, (12,))
    sites = [GrowthSite("a", "b", ("relu()",))]
    assert gk.find_sites(model, (x, shift)) == sites
    expected = gk.collect(model, sites, [((x[:5], shift[:5]), y[:5]), ([x[5:], shift[5:]], y[5:])], F.cross_entropy)[
        "a"
    ]

    class Pairs(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
            return (x[i], shift[i]), y[i]

    loader = torch.utils.data.DataLoader(Pairs(), batch_size=5)
    found = gk.collect(model, sites, loader, F.cross_entropy)["a"]
    assert found.count == expected.count == 12
    for key in ("xx", "xh", "xv", "hh", "hv", "vv", "xr"):
        close(getattr(found, key), getattr(expected, key), 1e-5)


def test_batches_and_growth_under_inference_mode_train_on() -> None:
    """Parameters made in inference mode could never be trained, nor tensors made there measured."""
    model, x, y = mlp(), torch.randn(20, 6), torch.randint(CLASSES, (20,))
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    sites = gk.find_sites(model, x)
    expected = gk.collect(model, sites, [(x, y)], F.cross_entropy)
    with torch.inference_mode():
        found = gk.collect(model, sites, [(x.clone(), y.clone())], F.cross_entropy)
        gk.apply(model, gk.solve(found["0"], neurons=2), optimizer=optimizer)
    for key, tensor in expected["0"].tensors().items():
        assert torch.equal(found["0"].tensors()[key], tensor), key
    before = model[0].weight.detach().clone()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert len(before) == 10
    assert (model[0].weight != before).any(1)[8:].all()


def test_losses_that_differentiate_by_themselves() -> None:
    """A gradient penalty calls autograd in the forward pass; here it has a closed form too."""
    model, x, y = mlp().double(), torch.randn(20, 6, dtype=F64), torch.randint(CLASSES, (20,))

    def penalised(z: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(z, target)
        return loss + torch.autograd.grad(loss, z, create_graph=True)[0].square().sum()

    def closed(z: Tensor, target: Tensor) -> Tensor:
        gradient = (z.softmax(1) - F.one_hot(target, CLASSES)) / len(z)
        return F.cross_entropy(z, target) + gradient.square().sum()

    sites = gk.find_sites(model, x)
    found, expected = (gk.collect(model, sites, [(x, y)], loss_fn) for loss_fn in (penalised, closed))
    for name, moments in expected.items():
        for key, tensor in moments.tensors().items():
            close(found[name].tensors()[key], tensor, 1e-9)


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_the_default_device_does_not_matter(name: str) -> None:
    """As after `torch.set_default_device("cuda")`, of a model that is elsewhere."""
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(12, 9)
    sites = gk.find_sites(model, batches[0][0])
    expected = gk.solve(gk.collect(model, sites, batches, F.cross_entropy))
    with torch.device("meta"):
        found = gk.solve(gk.collect(model, gk.find_sites(model, batches[0][0]), batches, F.cross_entropy))
        gk.widen(model, sites, {sites[0].name: 20})
    for site, new in expected.items():
        assert found[site].noise == new.noise
        assert torch.equal(found[site].best_update, new.best_update)
    assert torch.isfinite(model(batches[0][0])).all()


def test_batches_are_moved_whatever_they_come_in() -> None:
    """PackedSequence, and what Transformers libraries hand out, know how to move themselves."""
    Pair = namedtuple("Pair", "one two")
    sequences = torch.nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    lists = defaultdict(list, a=[torch.zeros(1), (torch.zeros(2), 3)], b="text")
    (first, *_, packed), target = to_device(([Pair(torch.zeros(4), 5), sequences], lists), torch.device("meta"))
    assert first.one.is_meta
    assert first.two == 5
    assert packed.data.is_meta
    assert packed.batch_sizes.device.type == "cpu"
    assert target["a"][0].is_meta
    assert target["a"][1][0].is_meta
    assert (target["a"][1][1], target["b"], target["new"]) == (3, "text", [])
    assert not lists["a"][0].is_meta


def test_inputs_in_a_dict_are_the_same_samples() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.b(torch.tanh(self.a(batch["x"])))

    model, x, y = Named(), torch.randn(20, 6), torch.randint(CLASSES, (20,))
    site = GrowthSite("a", "b", ("tanh()",))
    named = gk.collect(model, site, [({"x": x}, y)], F.cross_entropy)["a"]
    plain = nn.Sequential(model.a, nn.Tanh(), model.b)
    expected = gk.collect(plain, GrowthSite("0", "2", ("1",)), [(x, y)], F.cross_entropy)["0"]
    for key, tensor in expected.tensors().items():
        assert torch.equal(named.tensors()[key], tensor), key
