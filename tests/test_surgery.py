"""Widening layers, norms and optimizer state: what the old function does, and what the new units add to it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, CLASSES, FAMILIES, SMALL, assert_same, close, picture
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

import growkern as gk
from growkern import GrowthSite, NewNeurons
from growkern.surgery import trial

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64


def measured(name: str, site: str, neurons: int = 2, **options: Any) -> tuple[nn.Module, NewNeurons, list[Any]]:
    """A float64 model of a family with trained-looking norms, new neurons for one site, and the batches."""
    family = FAMILIES[name]
    model = lively(family.build().double())
    batches = family.batches(*((30, 20) if name in SMALL else (10, 4)), dtype=F64)
    sites = [s for s in gk.find_sites(model, batches[0][0]) if s.name == site]
    new = gk.solve(gk.collect(model, sites, batches, F.cross_entropy, null_draws=0, **options)[site], neurons=neurons)
    assert len(new) == neurons
    return model, new, batches


def lively(model: nn.Module) -> nn.Module:
    """Give norms weights and statistics of their own, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def drawn(new: NewNeurons, count: int = 3) -> NewNeurons:
    """Neurons of the same shapes with random weights, in no relation to the data."""
    p, outputs = new.alpha.shape[1], new.omega.shape[0]
    alpha, omega = torch.randn(count, p, dtype=F64), torch.randn(outputs, count, dtype=F64)
    update = torch.randn_like(new.best_update)
    values = torch.ones(count, dtype=F64)
    mean = None if new.mean is None else torch.randn(count, dtype=F64)
    variance = None if new.variance is None else torch.rand(count, dtype=F64) + 0.1
    return dataclasses.replace(
        new, alpha=alpha, omega=omega, best_update=update, singular_values=values, mean=mean, variance=variance
    )


def caught(model: nn.Module, site: GrowthSite, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input of the producer, input of the consumer, output of the consumer, in evaluation mode."""
    seen = {}
    producer, consumer = model.get_submodule(site.producer), model.get_submodule(site.consumer)
    handles = [
        producer.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].clone())),
        consumer.register_forward_hook(lambda m, a, z: seen.update(h=a[0].clone(), z=z.clone())),
    ]
    training = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(training)
    for handle in handles:
        handle.remove()
    return seen["x"], seen["h"], seen["z"]


def everywhere(names: list[Any]) -> list[Any]:
    """Every site of every family that is named."""
    params = []
    for each in names:
        name, marks = (each.values[0], each.marks) if not isinstance(each, str) else (each, ())
        params += [pytest.param(name, site, marks=marks, id=f"{name}-{site}") for site in FAMILIES[name].sites]
    return params


# The function -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "site"), everywhere(ALL))
def test_scale_zero_preserves_the_function(name: str, site: str) -> None:
    model, new, batches = measured(name, site)
    x = batches[0][0]
    before = model.eval()(x)
    units = model.get_submodule(site).weight.shape[0]
    gk.apply(model, new, scale=0.0, update=True)
    assert (model(x) - before).abs().max() <= 1e-12
    assert model.get_submodule(site).weight.shape[0] == units + 2


def windows(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Patches (B, p, H, W) under a convolution, with ones below if it has a bias."""
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    probe = F.conv2d(x[:1], layer.weight[:1], None, layer.stride, layer.padding, layer.dilation)
    patches = patches.unflatten(2, probe.shape[2:])
    return torch.cat([patches, torch.ones_like(patches[:, :1])], 1) if layer.bias is not None else patches


def rows(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if layer.bias is not None else x


def centre(hidden: Tensor, layer: nn.Conv2d, size: torch.Size) -> Tensor:
    """What the tap at k // 2 of a convolution reads of a hidden map, at each output; zero outside."""
    out = hidden.new_zeros(*hidden.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            at = [
                p * layer.stride[axis] - layer.padding[axis] + layer.dilation[axis] * (layer.kernel_size[axis] // 2)
                for axis, p in enumerate((i, j))
            ]
            if 0 <= at[0] < hidden.shape[2] and 0 <= at[1] < hidden.shape[3]:
                out[:, :, i, j] = hidden[:, :, at[0], at[1]]
    return out


SITES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), (6,), torch.tanh),
    "linear, no bias": (
        lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False)),
        (6,),
        F.relu,
    ),
    "linear, norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 4)),
        (6,),
        F.gelu,
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), (3, 6), F.relu),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)),
        (3, 7, 6),
        F.relu,
    ),
    "conv, strides": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, (3, 2), (2, 1), 1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 4, (3, 4), (1, 2), (2, 1), (2, 1)),
        ),
        (3, 9, 8),
        F.relu,
    ),
    "conv, pool": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, padding=1)),
        (3, 9, 9),
        lambda t: F.max_pool2d(F.relu(t), 2),
    ),
    "flatten": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(60, 4)),
        (3, 6, 8),
        lambda t: F.avg_pool2d(F.relu(t), (1, 2)),
    ),
}


@pytest.mark.parametrize("scale", [1.0, 0.49, -0.36])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, "full") for name in SITES), ("conv", "center"), ("conv, strides", "center")]
)
def test_new_units_add_what_their_formula_says(name: str, kernel: str, update: bool, scale: float) -> None:
    """The consumer's output grows by γ·dW*·h and by Σ σ(√|γ| α x)·(±√|γ| ω), both computed without the surgery."""
    build, sample, between = SITES[name]
    model = lively(build().double())
    x = torch.randn(6, *sample, dtype=F64)
    (site,) = gk.find_sites(model, x)
    moments = gk.collect(model, [site], [(x, None)], lambda y, _: y.square().mean(), kernel=kernel, null_draws=0)
    new = drawn(gk.solve(moments[site.name], neurons=1))
    seen, h, z = caught(model, site, x)
    producer, consumer = model.get_submodule(site.producer), model.get_submodule(site.consumer)
    alpha, omega = math.sqrt(abs(scale)) * new.alpha, math.copysign(math.sqrt(abs(scale)), scale) * new.omega

    old, r, count = consumer.weight.detach(), consumer.weight.shape[0], len(new)
    if isinstance(producer, nn.Linear):
        added = between(rows(seen, producer) @ alpha.T) @ omega.T
        reached = rows(h, consumer) @ new.best_update.T
    else:
        hidden = between(torch.einsum("bpij,kp->bkij", windows(seen, producer), alpha))
        if isinstance(consumer, nn.Linear):
            fan_out = omega.view(r, *hidden.shape[2:], count)
            added = torch.einsum("bkij,rijk->br", hidden, fan_out)
            reached = rows(h, consumer) @ new.best_update.T
        else:
            if kernel == "full":
                fan_out = omega.view(r, *consumer.kernel_size, count).permute(0, 3, 1, 2)
                added = F.conv2d(hidden, fan_out, None, consumer.stride, consumer.padding, consumer.dilation)
            else:
                added = torch.einsum("bkij,rk->brij", centre(hidden, consumer, z.shape[2:]), omega)
            reached = torch.einsum("bqij,rq->brij", windows(h, consumer), new.best_update)
    gk.apply(model, new, scale=scale, update=update)
    close(caught(model, site, x)[2], z + added + (scale * reached if update else 0))
    assert update or torch.equal(consumer.weight[:, : old.shape[1]], old)


@pytest.mark.parametrize(("name", "site"), everywhere(SMALL))
def test_old_entries_stay_in_the_leading_corner(name: str, site: str) -> None:
    model, new, _ = measured(name, site)
    old = {key: value.clone() for key, value in model.state_dict().items()}
    gk.apply(model, new, scale=0.7)
    for key, value in model.state_dict().items():
        assert torch.equal(value[tuple(slice(n) for n in old[key].shape)], old[key]), key


def test_modules_know_their_new_sizes() -> None:
    model, new, _ = measured("vgg", "0")
    gk.apply(model, new)
    assert (model[0].out_channels, model[1].num_features, model[4].in_channels) == (8, 8, 8)
    model, new, _ = measured("vgg", "4", 3)
    gk.apply(model, new)
    assert (model[4].out_channels, model[10].in_features) == (8, 72)
    model, new, _ = measured("vgg", "10", 3)
    gk.apply(model, new)
    assert (model[10].out_features, model[12].in_features) == (12, 12)


@pytest.mark.parametrize(("name", "site"), everywhere(SMALL))
def test_no_neurons_change_nothing(name: str, site: str) -> None:
    model, new, batches = measured(name, site)
    optimizer = Adam(model.parameters())
    old = {key: value.clone() for key, value in model.state_dict().items()}
    gk.apply(model, drawn(new, 0), optimizer=optimizer)
    assert_same(old, dict(model.state_dict()))
    train(model, optimizer, *batches[0], 1)
    assert not torch.equal(model.get_submodule(site).weight, old[f"{site}.weight"])


# Norms ---------------------------------------------------------------------------------------------------

NORMED: dict[str, tuple[Callable[[bool], tuple[nn.Module, ...]], tuple[int, ...]]] = {
    "linear": (lambda b: (nn.Linear(6, 5, bias=b), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)), (6,)),
    "conv": (
        lambda b: (nn.Conv2d(3, 5, 3, 2, 1, bias=b), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)),
        (3, 9, 8),
    ),
    "average pooling": (
        lambda b: (nn.Conv2d(3, 5, 3, bias=b), nn.AvgPool2d(2), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 2)),
        (3, 9, 8),
    ),
    "padded average pooling": (
        lambda b: (nn.Conv2d(3, 5, 3, bias=b), nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)),
        (3, 9, 8),
    ),
    "pooling after": (
        lambda b: (nn.Conv2d(3, 5, 3, 2, bias=b), nn.BatchNorm2d(5), nn.AvgPool2d(3, 1, 1), nn.Conv2d(5, 4, 3)),
        (3, 9, 7),
    ),
    "flatten": (
        lambda b: (nn.Conv2d(3, 5, 3, bias=b), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(40, 4)),
        (3, 6, 4),
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NORMED)
def test_batch_norm_is_born_as_the_identity(name: str, bias: bool) -> None:
    """In evaluation mode; its running statistics are those of the pre-activation on the measured batches."""
    build, sample = NORMED[name]
    model = lively(nn.Sequential(*build(bias)).double())
    batches = [(torch.randn(n, *sample, dtype=F64) + 0.5, None) for n in (37, 24)]
    (site,) = gk.find_sites(model, batches[0][0])
    moments = gk.collect(model, [site], batches, lambda y, _: y.pow(4).mean(), null_draws=0)
    new = gk.solve(moments["0"], neurons=2, method="random")
    (norm,) = (m for m in model if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    old = {k: v.clone() for k, v in norm.state_dict().items()}
    gk.apply(model, new, scale=-0.6)
    seen: list[tuple[Tensor, Tensor]] = []
    norm.register_forward_hook(lambda m, a, out: seen.append((a[0][:, 5:], out[:, 5:])))
    with torch.no_grad():
        for x, _ in batches:
            model.eval()(x)
    before, after = (torch.cat([pair[i].transpose(0, 1).flatten(1) for pair in seen], 1) for i in (0, 1))
    assert len(before) == 2
    close(after, before, 1e-12)
    close(norm.running_mean[5:], before.mean(1))
    close(norm.running_var[5:], before.var(1, unbiased=False))
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, key)[:5], old[key])
    assert norm.num_batches_tracked == old["num_batches_tracked"]


def grouped() -> tuple[nn.Module, NewNeurons, Tensor]:
    layers = nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 3)
    model = lively(nn.Sequential(*layers).double())
    x = torch.randn(20, 3, 8, 8, dtype=F64)
    moments = gk.collect(model, gk.find_sites(model, x), [(x, None)], lambda y, _: y.pow(4).mean(), null_draws=0)
    with pytest.raises(ValueError, match=r"'0'.*multiples of 2"):
        gk.solve(moments["0"], neurons=3)
    assert len(gk.solve(moments["0"], neurons=6, max_neurons=5)) == 4
    return model, gk.solve(moments["0"], neurons=4), x


def test_group_norm_keeps_old_groups() -> None:
    model, new, x = grouped()
    before = model(x)
    same = copy.deepcopy(model)
    gk.apply(same, new, scale=0.0)
    assert (same(x) - before).abs().max() <= 1e-12
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda m, a, out: outputs.append(out.detach()))
    model(x)
    gk.apply(model, new, scale=0.5)
    model(x)
    close(outputs[1][:, :6], outputs[0], 1e-12)
    assert (model[1].num_groups, model[1].num_channels) == (5, 10)
    pre = F.conv2d(x, model[0].weight[6:], model[0].bias[6:]).transpose(0, 1).reshape(2, -1)  # two groups of two
    close(model[1].weight[6:], (pre.var(1, unbiased=False) + model[1].eps).sqrt().repeat_interleave(2))
    close(model[1].bias[6:], pre.mean(1).repeat_interleave(2))


def test_group_norm_refuses_part_of_a_group() -> None:
    model, new, _ = grouped()
    odd = drawn(new, 3)
    before = picture(model)
    with pytest.raises(ValueError, match="multiples of 2"):
        gk.apply(model, odd)
    assert_same(before, picture(model))


# The optimizer -------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.05),
    "sgd momentum": lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, 0.01),
    "amsgrad": lambda p: Adam(p, 0.01, amsgrad=True),
    "adam foreach": lambda p: Adam(p, 0.01, foreach=True),
    "adam fused": lambda p: Adam(p, 0.01, fused=True),
    "adamw": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: Adagrad(p, 0.05),
    "nadam": lambda p: NAdam(p, 0.01),
    "radam": lambda p: RAdam(p, 0.01),
    "adamax": lambda p: Adamax(p, 0.01),
    "adadelta": lambda p: Adadelta(p, 1.0),
    "rprop": lambda p: Rprop(p, 0.01),
}


def plain() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, CLASSES)).double()
    return model, torch.randn(40, 6, dtype=F64), torch.randint(CLASSES, (40,))


def new_for(model: nn.Module, x: Tensor, target: Tensor, site: str = "0", neurons: int = 2) -> NewNeurons:
    sites = [s for s in gk.find_sites(model, x) if s.name == site]
    return gk.solve(gk.collect(model, sites, [(x, target)], F.cross_entropy, null_draws=0)[site], neurons=neurons)


def train(model: nn.Module, optimizer: Optimizer, x: Tensor, target: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def corner(value: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The leading corner of a tensor, and all the rest of it in a row."""
    rest = torch.ones_like(value, dtype=torch.bool)
    at = tuple(slice(n) for n in old.shape)
    rest[at] = False
    return value[at].detach(), value[rest].detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_grows_with_the_parameters(name: str) -> None:
    model, x, target = plain()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, target, 3)
    new = new_for(model, x, target)
    params = list(model.parameters())
    old = copy.deepcopy([dict(optimizer.state.get(p, {})) for p in params])
    untouched = {p: dict(optimizer.state.get(p, {})) for p in params[3:]}
    gk.apply(model, new, optimizer=optimizer)

    grown = list(model.parameters())
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in grown]
    assert {id(p) for p in optimizer.state} <= {id(p) for p in grown}
    for p, before in zip(grown, old, strict=True):
        state = optimizer.state.get(p, {})
        assert state.keys() == before.keys()
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == p.shape
                leading, rest = corner(value, before[key])
                assert torch.equal(leading, before[key])
                assert not rest.any()
            else:
                assert value == before[key]
    for p, state in untouched.items():
        assert any(p is now for now in grown), "a parameter was replaced for no reason"
        assert all(optimizer.state[p][key] is value for key, value in state.items())

    before = [p.detach().clone() for p in grown]
    train(model, optimizer, x, target, 1)
    for now, then, first in list(zip(grown, before, params, strict=True))[:3]:  # producer, and consumer's weight
        assert corner(now - then, first)[1].any(), "new entries do not learn"
        for key, value in optimizer.state.get(now, {}).items():
            if isinstance(value, Tensor) and value.dim():
                assert corner(value, first)[1].any(), key


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dead_units_leave_training_as_it_was(name: str, steps: int) -> None:
    """With α = ω = 0 behind a ReLU nothing ever moves in the new entries, and the old ones train on as before."""
    model, x, target = plain()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, target, steps)
    alone = copy.deepcopy(model)
    other = OPTIMIZERS[name](alone.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    new = new_for(model, x, target)
    gk.apply(model, dataclasses.replace(new, alpha=0 * new.alpha, omega=0 * new.omega), optimizer=optimizer)
    train(model, optimizer, x, target, 3)
    train(alone, other, x, target, 3)
    for grown, p in zip(model.parameters(), alone.parameters(), strict=True):
        leading, rest = corner(grown, p)
        close(leading, p, 1e-9)
        assert not rest.any()


def test_parameter_groups_keep_their_order_and_settings() -> None:
    model, x, target = plain()
    named = [
        {"params": [("c", model[4].weight), ("a", model[0].weight)], "lr": 0.1},
        {"params": [("b", model[2].weight), ("ab", model[0].bias), ("bb", model[2].bias)], "momentum": 0.5},
    ]
    optimizer = SGD(named, 0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, x, target, 1)
    groups = list(optimizer.param_groups)
    settings = [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in groups]
    gk.apply(model, new_for(model, x, target), optimizer=optimizer)
    expected = [[model[4].weight, model[0].weight], [model[2].weight, model[0].bias, model[2].bias]]
    for group, now, params, old in zip(groups, optimizer.param_groups, expected, settings, strict=True):
        assert now is group, "schedulers hold on to the groups"
        assert [id(p) for p in now["params"]] == [id(p) for p in params]
        assert {k: v for k, v in now.items() if k != "params"} == old
    train(model, optimizer, x, target, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.001])


def test_optimizer_of_the_state_dict() -> None:
    """A state dict taken after growth loads into a fresh optimizer, which then steps identically."""
    model, x, target = plain()
    optimizer = Adam(model.parameters(), 0.01)
    train(model, optimizer, x, target, 2)
    gk.apply(model, new_for(model, x, target), optimizer=optimizer)
    twin = copy.deepcopy(model)
    other = Adam(twin.parameters(), 0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, x, target, 2)
    train(twin, other, x, target, 2)
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


class Factored(Optimizer):
    """Keeps one number per row of a weight."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["row"] = p.grad.flatten(1).square().sum(1) if p.dim() > 1 else p.grad.clone()


@pytest.mark.parametrize("site", ["0", "2"])
@pytest.mark.parametrize("make", [Factored, Adafactor], ids=["rows", "adafactor"])
def test_factored_state_is_refused(make: Callable[[Any], Optimizer], site: str) -> None:
    model, x, target = plain()
    optimizer = make(model.parameters())
    train(model, optimizer, x, target, 2)
    new = new_for(model, x, target, site)
    before = picture(model, optimizer)
    with pytest.raises(ValueError, match=rf"optimizer: {type(optimizer).__name__}"):
        gk.apply(model, new, optimizer=optimizer)
    assert_same(before, picture(model, optimizer))


def test_adafactor_before_its_first_step_grows() -> None:
    model, x, target = plain()
    optimizer = Adafactor(model.parameters())
    gk.apply(model, new_for(model, x, target), optimizer=optimizer)
    grown = model[0].weight.detach().clone()
    train(model, optimizer, x, target, 2)
    assert ((model[0].weight - grown)[5:].abs().sum(1) > 0).all()


@pytest.mark.parametrize("site", ["0", "2"])
@pytest.mark.parametrize("steps", [0, 2])
def test_lbfgs_is_refused_or_goes_on_with_the_new_parameters(steps: int, site: str) -> None:
    """It holds a list of its own, of the parameters, and flat histories of all of them together."""
    model, x, target = plain()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    new = new_for(model, x, target, site)
    before = picture(model, optimizer)
    refused = ""
    try:
        gk.apply(model, new, optimizer=optimizer)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("optimizer:")
        assert_same(before, picture(model, optimizer))
    else:
        grown = [p.detach().clone() for p in model.parameters()]
        optimizer.step(closure)
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), grown, strict=True))


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh gradients", "carried gradients"])
def test_fused_adam_on_channels_last(fresh: bool) -> None:
    """Fused kernels walk parameter, gradient and state in memory order: all three need one format."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.to(memory_format=torch.channels_last)
    x, target = torch.randn(20, 3, 8, 8).to(memory_format=torch.channels_last), torch.randint(5, (20,))
    results = []
    for fused in (False, True):
        twin = copy.deepcopy(model)
        optimizer = Adam(twin.parameters(), 0.01, fused=fused, foreach=False)
        train(twin, optimizer, x, target, 2)
        gk.apply(twin, new_for(twin, x, target), optimizer=optimizer)
        if fresh:
            train(twin, optimizer, x, target, 2)
        else:
            optimizer.step()
        results.append(dict(twin.named_parameters()))
    for name, p in results[0].items():
        close(results[1][name], p, 1e-4)


# What parameters carry -----------------------------------------------------------------------------------


def test_frozen_parameters_stay_frozen() -> None:
    model, x, target = plain()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    gk.apply(model, new_for(model, x, target), update=True)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False, True, True]


def test_gradients_are_carried() -> None:
    model, x, target = plain()
    F.cross_entropy(model(x), target).backward()
    model[0].bias.grad = None
    old = [p.grad for p in model.parameters()]
    gk.apply(model, new_for(model, x, target))
    for p, grad in zip(model.parameters(), old, strict=True):
        if grad is None:
            assert p.grad is None
        else:
            leading, rest = corner(p.grad, grad)
            assert torch.equal(leading, grad)
            assert not rest.any()


def test_attributes_of_parameters_are_kept() -> None:
    """Training recipes mark parameters, as in `p.no_weight_decay = True`."""
    model, x, target = plain()
    for p in model.parameters():
        p.no_weight_decay = p.dim() == 1
    gk.apply(model, new_for(model, x, target))
    assert [p.no_weight_decay for p in model.parameters()] == [p.dim() == 1 for p in model.parameters()]


@pytest.mark.parametrize("update", [False, True])
def test_channels_last_is_kept(update: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)
    (site,) = gk.find_sites(model, x)
    new = gk.solve(gk.collect(model, [site], [(x, None)], lambda y, _: y.square().mean())["0"], neurons=2)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    gk.apply(model, new, update=update, optimizer=optimizer)
    for layer in (model[0], model[2]):
        state = optimizer.state[layer.weight]["momentum_buffer"]
        for name, tensor in (("weight", layer.weight), ("grad", layer.weight.grad), ("state", state)):
            assert tensor.is_contiguous(memory_format=torch.channels_last), name
            assert not tensor.is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).to(dtype)
    x = torch.randn(40, 6, dtype=dtype)
    (site,) = gk.find_sites(model, x)
    moments = gk.collect(model, [site], [(x, None)], lambda y, _: y.float().square().mean())
    assert {t.dtype for key, t in moments["0"].tensors().items() if key != "update"} == {torch.float32}
    new = gk.solve(moments["0"], neurons=2)
    old = model(x)
    expected = old.double() + 0.5 * F.relu(rows(x.double(), model[0]) @ new.alpha.T) @ new.omega.T
    gk.apply(model, new, scale=0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    close(model(x), expected, 0.03)


def test_tied_bias_stays_tied_or_is_refused() -> None:
    """Otherwise the other holder of the bias falls out of the optimizer without a word."""
    model, x, target = plain()
    model.append(nn.ReLU())
    tied = nn.Linear(CLASSES, 5).double()
    model.append(tied)
    new = new_for(model[:5], x, target)
    tied.bias = model[0].bias
    optimizer = SGD(model.parameters(), 0.1)
    before = picture(model, optimizer)
    with pytest.raises(ValueError, match="bias"):
        gk.apply(model, new, optimizer=optimizer)
    assert_same(before, picture(model, optimizer))


# What does not fit ---------------------------------------------------------------------------------------


def grown_upstream() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "2")
    gk.apply(model, new_for(model, x, target, "0"))
    return model, new


def grown_downstream() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    gk.apply(model, new_for(model, x, target, "2"))
    return model, new


def grown_already() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    gk.apply(model, new)
    return model, new


def other_layer() -> tuple[nn.Module, NewNeurons]:
    model, new = grown_already()
    model[2] = nn.Sequential(model[2])
    return model, new


def lost_bias() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    model[0].bias = None
    return model, new


def other_kernel() -> tuple[nn.Module, NewNeurons]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    new = new_for(model, torch.randn(20, 3, 8, 8), torch.randint(5, (20,)))
    model[2] = nn.Conv2d(4, 5, 5)
    return model, new


def wrong_name() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    return model, dataclasses.replace(new, site=GrowthSite("first", "2", ("1",)))


def norm_appeared() -> tuple[nn.Module, NewNeurons]:
    model, x, target = plain()
    new = new_for(model, x, target, "0")
    model[1] = nn.BatchNorm1d(5).double()
    return model, new


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (grown_upstream, "fan-in"),
        (grown_downstream, "fan-out of 7, but 2 now has 9"),
        (grown_already, "updates"),
        (other_layer, "2 is a Sequential"),
        (lost_bias, "fan-in"),
        (other_kernel, "fan-out"),
        (wrong_name, "first"),
        (norm_appeared, r"new: .*norm"),
    ],
)
def test_neurons_that_do_not_fit_change_nothing(
    build: Callable[[], tuple[nn.Module, NewNeurons]], message: str
) -> None:
    model, new = build()
    optimizer = SGD(model.parameters(), 0.1)
    before = picture(model, optimizer)
    with pytest.raises(ValueError, match=message):
        gk.apply(model, new, optimizer=optimizer)
    assert_same(before, picture(model, optimizer))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_must_be_finite(scale: float) -> None:
    model, x, target = plain()
    new = new_for(model, x, target)
    before = picture(model)
    with pytest.raises(ValueError, match="scale"):
        gk.apply(model, new, scale=scale)
    assert_same(before, picture(model))


# Trials --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["", "exception"])
@pytest.mark.parametrize(("name", "site"), everywhere(SMALL))
def test_trial_brings_everything_back(name: str, site: str, fails: bool) -> None:
    model, new, batches = measured(name, site)
    optimizer = Adam(model.parameters())
    train(model, optimizer, *batches[0], 1)
    model.eval()
    expected = copy.deepcopy(model)
    gk.apply(expected, new, scale=-0.7, update=True)
    before = picture(model, optimizer)
    raised = False
    try:
        with trial(model, new, scale=-0.7, update=True):
            inside = model(batches[0][0])
            if fails:
                raise KeyError
    except KeyError:
        raised = True
    assert raised == fails
    assert torch.equal(inside, expected(batches[0][0]))
    assert_same(before, picture(model, optimizer))


def test_trial_of_a_group_norm() -> None:
    model, new, x = grouped()
    before = picture(model)
    with trial(model, new, scale=2.0):
        assert model[1].num_groups == 5
        model(x)
    assert_same(before, picture(model))


def test_trial_refuses_what_apply_refuses() -> None:
    model, new = grown_already()
    before = picture(model)
    with pytest.raises(ValueError, match="updates"), trial(model, new, scale=1.0):
        pass
    assert_same(before, picture(model))
