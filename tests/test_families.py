"""Whole families of networks: grow one site of each kind, and go on training, saving and exporting."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, CLASSES, FAMILIES, SMALL, assert_same, close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import growkern as gk
from growkern.surgery import trial

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.03, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 3e-3),
}


def rotated() -> list[Any]:
    """Every site of every family with every method; optimizers take turns. Large networks with TINY only."""
    params = []
    for each in ALL:
        name, marks = (each.values[0], each.marks)
        for i, site in enumerate(FAMILIES[name].sites):
            for j, method in enumerate(gk.METHODS if name in SMALL else ["tiny"]):
                # "joint" needs moments that a fan-out of whole kernels does not have.
                kernel = "center" if method == "joint" and "conv" in type_of(name, site) else "full"
                if method == "joint" and type_of(name, site) == "conv, flatten":
                    continue
                optimizer = list(OPTIMIZERS)[(i + j) % 3]
                label = f"{name}-{site}-{method}-{optimizer}"
                params.append(pytest.param(name, site, method, kernel, optimizer, marks=marks, id=label))
    return params


def type_of(name: str, site: str) -> str:
    """What kind of layers a site joins."""
    if name in ("mlp", "transformer", "torchvision vit") or (name, site) == ("vgg", "10"):
        return "linear"
    return "conv, flatten" if name == "flatten" or (name, site) == ("vgg", "4") else "conv"


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], count: int) -> list[float]:
    """Losses before each step, all with the same dropout."""
    losses = []
    for _ in range(count):
        torch.manual_seed(2)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


def grow(
    model: nn.Module, name: str, site: str, optimizer: torch.optim.Optimizer | None = None, **how: Any
) -> gk.NewNeurons:
    """Measure, solve and apply two neurons at a site."""
    kernel, method = how.get("kernel", "full"), how.get("method", "tiny")
    batches = batches_of(name)
    sites = [s for s in gk.find_sites(model, batches[0][0]) if s.name == site]
    moments = gk.collect(model, sites, batches, F.cross_entropy, kernel=kernel, null_draws=0)
    new = gk.solve(moments[site], neurons=2, method=method)
    gk.apply(model, new, scale=0.1, optimizer=optimizer)
    return new


def batches_of(name: str) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return FAMILIES[name].batches(*((40, 30) if name in SMALL else (8, 8)))


def kinds(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize(("name", "site", "method", "kernel", "optimizer"), rotated())
def test_grown_network_trains_on(name: str, site: str, method: str, kernel: str, optimizer: str) -> None:
    model = FAMILIES[name].build()
    optim = OPTIMIZERS[optimizer](model.parameters())
    batch = batches_of(name)[0]
    steps(model, optim, batch, 2)
    before, types = copy.deepcopy(model).eval(), kinds(model)
    new = grow(model, name, site, optim, kernel=kernel, method=method)
    assert len(new) == 2
    assert kinds(model) == types
    assert len(model.get_submodule(site).weight) == len(before.get_submodule(site).weight) + 2
    if gk.METHODS[method].starts_at_zero != "neither":  # α is a thousandth of a usual fan-in, or ω is zero
        close(model.eval()(batch[0]), before(batch[0]), 1e-4 if method == "random" else 0.05)
    width = len(before.get_submodule(site).weight)
    newborn = model.get_submodule(site).weight[width:].detach().clone()
    losses = steps(model.train(), optim, batch, 6)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0], losses
    assert not torch.equal(model.get_submodule(site).weight[width:], newborn), "the new units do not learn"
    assert torch.isfinite(model.eval()(batch[0])).all()


def smooth_sites() -> list[Any]:
    """Sites without max pooling between: there a ± pair behind ReLU or GELU is exactly linear."""
    chosen = [
        *(("resnet", "block2.conv1"), ("bottleneck", "block2.conv1"), ("bottleneck", "block2.conv2")),
        *(("mlp", "0"), ("vgg", "10"), ("flatten", "conv"), ("transformer", "layer.linear1")),
        *(("torchvision vit", FAMILIES["torchvision vit"].sites[0]), ("torchvision resnet18", "layer1.0.conv1")),
    ]
    mark = pytest.mark.check("torchvision families")
    return [pytest.param(*each, marks=() if each[0] in SMALL else mark, id="-".join(each)) for each in chosen]


@pytest.mark.parametrize(("name", "site"), smooth_sites())
def test_gain_is_the_slope_of_the_loss(name: str, site: str) -> None:
    """From moments through neurons to surgery: gain = −dL/dγ at γ = 0, by central differences in float64."""
    model = FAMILIES[name].build().double().eval()
    batches = [(x.double(), y) for x, y in batches_of(name)]
    sites = [s for s in gk.find_sites(model, batches[0][0]) if s.name == site]
    moments = gk.collect(model, sites, batches, F.cross_entropy, null_draws=0)[site]
    new = gk.solve(moments, neurons=2, paired=True)
    assert len(new) == 2

    def loss(scale: float) -> float:
        with torch.no_grad(), trial(model, new, scale=scale):
            losses = [F.cross_entropy(model(x), y, reduction="sum") for x, y in batches]
        return float(sum(losses)) / sum(len(y) for _, y in batches)

    size = 1e-4 / float(new.alpha.norm() * new.omega.norm())
    slope = (loss(-size) - loss(size)) / (2 * size)
    assert new.gain == pytest.approx(slope, rel=1e-4)
    assert new.gain > 0


def grown(name: str) -> nn.Module:
    """A network that has grown at one site of each kind."""
    model = FAMILIES[name].build()
    for site in FAMILIES[name].sites:
        grow(model, name, site)
    return model


KEPT = [each for each in ALL if each.values[0] not in ("torchvision resnet18", "torchvision vgg11")]


@pytest.mark.parametrize("name", KEPT)
def test_grown_network_copies_and_saves(name: str) -> None:
    """A deep copy, a pickle of the module, and a state dict into a copy all compute the same."""
    model = grown(name).eval()
    x = torch.randn(3, *FAMILIES[name].sample)
    expected = model(x)
    with torch.no_grad():  # where encoders of torch.nn take a fused path that reads weights, not modules
        close(model(x), expected, 1e-5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not torch.equal(twin(x), expected)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected), "the copy shares memory with the network"

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert kinds(loaded) == kinds(model) == kinds(FAMILIES[name].build())
    assert torch.equal(loaded(x), expected)
    assert str(loaded) == str(model) != str(FAMILIES[name].build())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert_same(dict(model.state_dict()), dict(torch.load(file, weights_only=True)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        FAMILIES[name].build().load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_grown_network_is_no_different_from_one_built_wide(name: str) -> None:
    """Fresh modules of the sizes that the grown ones state, loaded with its state, compute the same."""
    model = grown(name).eval()
    wide = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        fresh: nn.Module | None = None
        bias = getattr(module, "bias", None) is not None
        if isinstance(module, nn.Conv2d):
            shape = (module.kernel_size, module.stride, module.padding, module.dilation)
            fresh = nn.Conv2d(module.in_channels, module.out_channels, *shape, bias=bias)
        elif type(module) is nn.Linear:
            fresh = nn.Linear(module.in_features, module.out_features, bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            fresh = type(module)(module.num_features)
        if fresh is not None:
            parent, _, child = path.rpartition(".")
            setattr(wide.get_submodule(parent), child, fresh)
    wide.load_state_dict(model.state_dict())
    x = torch.randn(3, *FAMILIES[name].sample)
    assert torch.equal(wide.eval()(x), model(x))


def sites_of_small() -> list[Any]:
    return [pytest.param(name, site, id=f"{name}-{site}") for name in SMALL for site in FAMILIES[name].sites]


@pytest.mark.parametrize(("name", "site"), sites_of_small())
def test_a_unit_costs_what_moments_say(name: str, site: str) -> None:
    """Parameters, and multiply-adds of one image or sequence, against PyTorch's own counts before and after growth."""
    model = FAMILIES[name].build().eval()
    batches = batches_of(name)
    sites = [s for s in gk.find_sites(model, batches[0][0]) if s.name == site]
    moments = gk.collect(model, sites, batches, F.cross_entropy, null_draws=0)[site]

    def cost() -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            model(batches[0][0][:1])
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2

    before = cost()
    gk.apply(model, gk.solve(moments, neurons=3, method="random"))
    parameters, products = ((b - a) / 3 for a, b in zip(before, cost(), strict=True))
    assert moments.unit_parameters == parameters
    producer = model.get_submodule(site)
    shapes: list[Tensor] = []
    producer.register_forward_hook(lambda m, a, out: shapes.append(out))
    model(batches[0][0][:1])
    biases = math.prod(shapes[0].shape[2:]) if producer.bias is not None and shapes[0].dim() == 4 else 0
    if isinstance(producer, nn.Linear):  # adding a bias counts as a product in `unit_flops`
        biases = shapes[0][0].numel() // shapes[0].shape[-1]
    assert moments.unit_flops - biases == products


@pytest.mark.parametrize("name", SMALL)
def test_grown_network_grows_again(name: str) -> None:
    """Sites are the same as before, and the second growth finds what the first has left."""
    model = FAMILIES[name].build()
    x = torch.randn(2, *FAMILIES[name].sample)
    site = FAMILIES[name].sites[-1]
    sites = gk.find_sites(model, x)
    width = len(model.get_submodule(site).weight)
    first = grow(model, name, site)
    assert gk.find_sites(model, x) == sites
    second = grow(model, name, site)
    assert len(model.get_submodule(site).weight) == width + 4
    assert second.best_update.shape[1] > first.best_update.shape[1]


@pytest.mark.check("torch.export")
@pytest.mark.parametrize("name", SMALL)
def test_grown_network_exports(name: str) -> None:
    model = grown(name).eval()
    x = torch.randn(3, *FAMILIES[name].sample)
    exported = torch.export.export(model, (x,))
    close(exported.module()(x), model(x), 1e-5)
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.check("torch.compile")
@pytest.mark.parametrize("name", ["mlp", "flatten", "resnet"])
def test_compiled_network_follows_growth(name: str) -> None:
    """A network that was compiled before it grew computes what it has become."""
    model = FAMILIES[name].build().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(4, *FAMILIES[name].sample)
    before = compiled(x)
    for site in FAMILIES[name].sites:
        grow(model, name, site)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)
    compiled(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.parametrize("method", ["tiny", "gradmax"])
def test_grower_in_a_training_loop(name: str, method: str) -> None:
    """The loop of the README: train, grow, train on."""
    model = FAMILIES[name].build()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batches = batches_of(name)
    grower = gk.Grower(model, optimizer, F.cross_entropy, method=method, neurons=2)
    first = steps(model, optimizer, batches[0], 3)[0]
    event = grower.step(batches)
    assert event.accepted
    assert event.neurons == 2
    if method == "tiny":
        assert event.loss_after < event.loss_before
    site = next(s for s in grower.sites if s.name == event.site)
    assert len(model.get_submodule(site.producer).weight) == event.widths[event.site]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert steps(model, optimizer, batches[0], 12)[-1] < first
    assert model(batches[0][0]).shape == (40, CLASSES)
