"""Measuring: moments against explicit sums and gradients, and a model that is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, FAMILIES, SMALL, assert_same, close, mlp, picture, vgg
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import growkern as gk
from growkern import GrowthSite, Moments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

F64 = torch.float64
Batches = list[tuple[Any, Any]]


def quartic(z: Tensor, _: Any) -> Tensor:
    return z.pow(4).mean() + z.mean()


def summed(z: Tensor, _: Any) -> Tensor:
    return z.pow(2).sum()


def at(model: nn.Module, batches: Batches, loss_fn: Callable[..., Tensor], **options: Any) -> Moments:
    """Moments of the first site of a model."""
    sites = gk.find_sites(model, batches[0][0])[:1]
    return gk.collect(model, sites, batches, loss_fn, **options)[sites[0].name]


# An explicit measurement ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Net:
    """Producer, what lies between, consumer and a tail; and how the new units' inputs get to the consumer.

    `pool` is the linear map (average pooling) that lies between the two layers, if any.
    """

    producer: nn.Linear | nn.Conv2d
    between: nn.Module
    consumer: nn.Linear | nn.Conv2d
    sample: tuple[int, ...]
    pool: nn.Module | None = None

    def pooled(self, maps: Tensor) -> Tensor:
        return maps if self.pool is None else self.pool(maps)

    def model(self) -> nn.Sequential:
        return nn.Sequential(self.producer, self.between, self.consumer, nn.Tanh()).double()

    def batches(self, *sizes: int) -> Batches:
        return [(torch.randn(n, *self.sample, dtype=F64) + 0.3, None) for n in sizes]


def patches(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """(B, p, H, W): what a convolution reads at each place, in the order of weight.flatten(1), ones last."""
    x = F.pad(x, _zeros_around(layer))
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, d, s in zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    ]
    out = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).unflatten(2, size)
    return torch.cat([out, torch.ones_like(out[:, :1])], 1) if layer.bias is not None else out


def _zeros_around(layer: nn.Conv2d) -> list[int]:
    around: list[int] = []
    for axis in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            around += [total // 2, total - total // 2]
        else:
            around += [0, 0] if layer.padding == "valid" else [layer.padding[axis]] * 2
    return around


def read(maps: Tensor, layer: nn.Conv2d) -> list[Tensor]:
    """For each kernel offset of a convolution, what it reads of the maps at each output: (B, p, Ho, Wo)."""
    maps = F.pad(maps, _zeros_around(layer))
    (kh, kw), (sy, sx), (dy, dx) = layer.kernel_size, layer.stride, layer.dilation
    height, width = (
        (n - d * (k - 1) - 1) // s + 1 for n, k, d, s in zip(maps.shape[2:], (kh, kw), (dy, dx), (sy, sx), strict=True)
    )
    return [maps[:, :, i * dy :: sy, j * dx :: sx][:, :, :height, :width] for i in range(kh) for j in range(kw)]


def rows(t: Tensor, ones: bool) -> Tensor:
    t = t.reshape(-1, t.shape[-1])
    return torch.cat([t, torch.ones_like(t[:, :1])], 1) if ones else t


def explicit(net: Net, batches: Batches, loss_fn: Callable[..., Tensor], kernel: str) -> dict[str, Tensor]:
    """Moments of a Net by the letter: sums over batches of samples written out, over images or rows.

    v is −∂L/∂z of a loss that is a mean over the samples of a batch, times their number.
    """
    producer, consumer = net.producer, net.consumer
    model = net.model().eval()
    samples: list[tuple[Tensor, Tensor, Tensor]] = []  # x: (offsets, n, p); h: (n, q); v: (n, r)
    images, inputs = 0, []
    for x, target in batches:
        h = net.between(producer(x)).detach()
        z = consumer(h)
        (gradient,) = torch.autograd.grad(loss_fn(model[3](z), target), z)
        if isinstance(producer, nn.Linear):
            v = -gradient.reshape(-1, gradient.shape[-1])
            samples.append((rows(x, producer.bias is not None)[None], rows(h, consumer.bias is not None), v * len(v)))
            images += len(v)
            continue
        images += len(x)
        inputs.append(patches(x, producer))  # (B, p, H, W); norms come ahead of pooling here
        taken = net.pooled(inputs[-1])  # (B, p, Hh, Wh)
        if isinstance(consumer, nn.Linear):
            v = -gradient * len(x)
            samples.append((taken.flatten(2).permute(2, 0, 1), rows(h, consumer.bias is not None), v))
            continue
        offsets = read(taken, consumer)
        if kernel == "center":
            offsets = [offsets[(consumer.kernel_size[0] // 2) * consumer.kernel_size[1] + consumer.kernel_size[1] // 2]]
        flat = torch.stack([o.movedim(1, 3).flatten(0, 2) for o in offsets])
        v = -gradient.movedim(1, 3).flatten(0, 2) * len(x)
        samples.append((flat, patches(h, consumer).movedim(1, 3).flatten(0, 2), v))
    x, h, v = (torch.cat([sample[i] for sample in samples], 1 if i == 0 else 0) for i in range(3))
    sums = {"xx": torch.einsum("onp,onq->pq", x, x), "xv": torch.einsum("onp,nr->pro", x, v).flatten(1)}
    sums |= {"hh": h.T @ h, "hv": h.T @ v, "vv": v.T @ v}
    if kernel == "center" or isinstance(producer, nn.Linear):
        sums["xh"] = x[0].T @ h
    update = torch.linalg.pinv(h.T @ h, hermitian=True) @ (h.T @ v)
    sums["xr"] = torch.einsum("onp,nr->pro", x, v - h @ update).flatten(1)
    result = {name: value / images for name, value in sums.items()}
    if inputs:
        uniform = torch.cat([t.movedim(1, 3).flatten(0, 2) for t in inputs])
        result |= {"x_mean": uniform.mean(0), "x_second": uniform.T @ uniform / len(uniform)}
    return result


def _nets() -> dict[str, Callable[[], Net]]:
    def conv(*args: Any, **options: Any) -> nn.Conv2d:
        return nn.Conv2d(*args, **options)

    def between(norm: nn.Module | None = None, pool: nn.Module | None = None) -> nn.Sequential:
        return nn.Sequential(*(m for m in (norm, nn.ReLU(), pool) if m is not None))

    relu = nn.ReLU
    average = nn.AvgPool2d
    return {
        "linear": lambda: Net(nn.Linear(5, 4), relu(), nn.Linear(4, 3), (5,)),
        "linear, no bias": lambda: Net(nn.Linear(5, 4, bias=False), relu(), nn.Linear(4, 3, bias=False), (5,)),
        "tokens": lambda: Net(nn.Linear(5, 4, bias=False), nn.GELU(), nn.Linear(4, 3), (7, 5)),
        "conv": lambda: Net(conv(2, 3, 3, padding=1), relu(), conv(3, 4, 3, padding=1), (2, 6, 5)),
        "conv, no bias": lambda: Net(conv(2, 3, 3, bias=False), relu(), conv(3, 4, 2, bias=False), (2, 6, 5)),
        "conv, 1x1": lambda: Net(conv(2, 3, 1), relu(), conv(3, 4, 1), (2, 4, 3)),
        "conv, strides": lambda: Net(
            conv(2, 3, (3, 2), (2, 1), 1), relu(), conv(3, 4, (3, 4), (1, 2), (2, 1), (2, 1)), (2, 9, 8)
        ),
        "conv, same": lambda: Net(
            conv(2, 3, 4, padding="same", dilation=(1, 2)), relu(), conv(3, 4, (2, 3), padding="same"), (2, 7, 8)
        ),
        "conv, norm": lambda: Net(conv(2, 3, 3, 2, 1), between(nn.BatchNorm2d(3)), conv(3, 4, 3, padding=1), (2, 9, 8)),
        "pool": lambda: Net(
            conv(2, 3, 3, padding=1), between(pool=average(2)), conv(3, 4, 3, padding=1), (2, 9, 8), average(2)
        ),
        "pool, overlapping": lambda: Net(
            conv(2, 3, 3, padding=1), between(pool=average(3, 2)), conv(3, 4, 3), (2, 11, 12), average(3, 2)
        ),
        "pool, behind strides": lambda: Net(
            conv(2, 3, 3, 2, 1), between(pool=average(2, 1)), conv(3, 4, 3), (2, 11, 12), average(2, 1)
        ),
        "pool, padded": lambda: Net(
            conv(2, 3, 3), between(pool=average(3, 2, 1)), conv(3, 4, 3), (2, 11, 12), average(3, 2, 1)
        ),
        "pool, padded, not counted": lambda: Net(
            conv(2, 3, 3),
            between(pool=average(3, 2, 1, count_include_pad=False)),
            conv(3, 4, 3),
            (2, 11, 12),
            average(3, 2, 1, count_include_pad=False),
        ),
        "pool, ceil": lambda: Net(
            conv(2, 3, 3),
            between(pool=average(2, ceil_mode=True)),
            conv(3, 4, 2),
            (2, 9, 7),
            average(2, ceil_mode=True),
        ),
        "pool, adaptive": lambda: Net(
            conv(2, 3, 3),
            between(pool=nn.AdaptiveAvgPool2d((2, 3))),
            conv(3, 4, 2),
            (2, 7, 8),
            nn.AdaptiveAvgPool2d((2, 3)),
        ),
        "pool, same": lambda: Net(
            conv(2, 3, 2, padding="same"), between(pool=average(2)), conv(3, 4, 2), (2, 8, 6), average(2)
        ),
        # Max pooling is treated as the average over what lies inside the map.
        "max pool, padded": lambda: Net(
            conv(2, 3, 3, padding=1, bias=False),
            between(nn.BatchNorm2d(3), nn.MaxPool2d(3, 2, 1)),
            conv(3, 4, 3),
            (2, 9, 10),
            average(3, 2, 1, count_include_pad=False),
        ),
        "max pool": lambda: Net(
            conv(2, 3, 3), between(pool=nn.MaxPool2d(2)), conv(3, 4, 3, padding=1), (2, 9, 8), average(2)
        ),
        "flatten": lambda: Net(conv(2, 3, 3), nn.Sequential(relu(), nn.Flatten()), nn.Linear(24, 4), (2, 6, 4)),
        "flatten, pool": lambda: Net(
            conv(2, 3, 3, 2),
            nn.Sequential(relu(), average(2, 1), nn.Flatten()),
            nn.Linear(6, 4),
            (2, 8, 6),
            average(2, 1),
        ),
        "flatten, upsampled": lambda: Net(
            conv(2, 3, 3),
            nn.Sequential(relu(), average(4), nn.AdaptiveAvgPool2d(3), nn.Flatten()),
            nn.Linear(27, 4),
            (2, 6, 6),
            nn.Sequential(average(4), nn.AdaptiveAvgPool2d(3)),
        ),
    }


NETS = _nets()
KERNELS = [(name, "full") for name in NETS]
KERNELS += [(name, "center") for name in NETS if name.startswith(("conv", "pool", "max"))]


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_moments_are_explicit_sums(name: str, kernel: str) -> None:
    net = NETS[name]()
    model, batches = net.model(), net.batches(16, 21, 1)
    second_pass = kernel == "center" or isinstance(net.producer, nn.Linear)  # the others have it in any case
    moments = at(model, batches, quartic, kernel=kernel, null_draws=2 if second_pass else 0)
    expected = explicit(net, batches, quartic, kernel)
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        close(moments.x_mean, expected["x_mean"])
        close(moments.x_second, expected["x_second"])
    else:
        assert moments.x_mean is moments.x_second is None
    for key in ("xx", "xv", "hh", "hv", "vv", "xr"):
        close(getattr(moments, key), expected[key], 1e-9)
    if "xh" in expected:
        close(moments.xh, expected["xh"])
    else:
        assert moments.xh is None
    assert moments.count == sum(len(x) for x, _ in batches) * (7 if name == "tokens" else 1)


def test_uniform_moments_ahead_of_a_norm_on_rows() -> None:
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
        batches = [(torch.randn(n, 5, dtype=F64) + 1, None) for n in (6, 11)]
        moments = at(model, batches, quartic)
        x = rows(torch.cat([x for x, _ in batches]), bias)
        close(moments.x_mean, x.mean(0))
        close(moments.x_second, x.T @ x / len(x))


# Gradients -----------------------------------------------------------------------------------------------


def weighted(model: nn.Module, batches: Batches, loss_fn: Callable[..., Tensor]) -> Tensor:
    """The loss over all samples: the mean of the batches' means, weighted by their lengths."""
    total = sum(len(x) for x, _ in batches)
    return sum(loss_fn(model(x), y) * (len(x) / total) for x, y in batches)  # type: ignore[return-value]


@pytest.mark.parametrize("name", NETS)
def test_hv_is_minus_the_gradient_of_the_consumer(name: str) -> None:
    """Of a mean loss, exactly, whatever the lengths of the batches."""
    net = NETS[name]()
    model, batches = net.model(), net.batches(6, 11, 1)
    moments = at(model, batches, quartic, null_draws=0)
    weighted(model.eval(), batches, quartic).backward()
    gradient = net.consumer.weight.grad.flatten(1)
    if net.consumer.bias is not None:
        gradient = torch.cat([gradient, net.consumer.bias.grad[:, None]], 1)
    close(moments.hv, -gradient.T)


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_xv_is_minus_the_gradient_of_a_product_weight(name: str, kernel: str) -> None:
    """Of a virtual layer from the producer's patches to the consumer's output, which new units factorise."""
    net = NETS[name]()
    producer, consumer = net.producer, net.consumer
    model, batches = net.model(), net.batches(6, 4)
    moments = at(model, batches, quartic, kernel=kernel, null_draws=0)
    product = torch.zeros(moments.xv.shape, dtype=F64, requires_grad=True)  # (p, r·offsets)
    seen: dict[str, Tensor] = {}

    def add(_: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> Tensor:
        x, r = seen["x"], z.shape[1] if z.dim() == 4 else z.shape[-1]
        if isinstance(producer, nn.Linear):
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1) if producer.bias is not None else x
            return z + x @ product
        x = net.pooled(patches(x, producer))
        if isinstance(consumer, nn.Linear):
            return z + torch.einsum("bpij,prij->br", x, product.view(len(product), r, *x.shape[2:]))
        weight = product.view(len(product), r, *(consumer.kernel_size if kernel == "full" else (1, 1))).transpose(0, 1)
        if kernel == "center":
            kh, kw = consumer.kernel_size
            weight = F.pad(weight, [kw // 2, kw - 1 - kw // 2, kh // 2, kh - 1 - kh // 2])
        return z + F.conv2d(F.pad(x, _zeros_around(consumer)), weight, None, consumer.stride, 0, consumer.dilation)

    producer.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    consumer.register_forward_hook(add)
    weighted(model.eval(), batches, quartic).backward()
    close(moments.xv, -product.grad)


def test_images_of_several_sizes() -> None:
    net = NETS["conv"]()
    model = net.model()
    batches = [(torch.randn(n, 2, *size, dtype=F64), None) for n, size in ((3, (6, 5)), (4, (9, 7)))]
    moments = at(model, batches, quartic, null_draws=0)
    weighted(model, batches, quartic).backward()
    gradient = torch.cat([net.consumer.weight.grad.flatten(1), net.consumer.bias.grad[:, None]], 1)
    close(moments.hv, -gradient.T)


def test_reductions_differ_by_known_factors() -> None:
    """A loss summed over images is their number times the mean: v, for rows of images, is the same."""
    model = FAMILIES["resnet"].build().double()
    batches = FAMILIES["resnet"].batches(6, 5, dtype=F64)
    mean = at(model, batches, F.cross_entropy, null_draws=0)
    total = at(model, batches, lambda z, y: F.cross_entropy(z, y, reduction="sum"), reduction="sum", null_draws=0)
    for key, value in mean.tensors().items():
        close(getattr(total, key), value)
    model = FAMILIES["transformer"].build().double()
    batches = FAMILIES["transformer"].batches(6, 5, dtype=F64)  # 5 tokens each: v of "mean" is per token
    mean = at(model, batches, F.cross_entropy, null_draws=0)
    total = at(model, batches, lambda z, y: F.cross_entropy(z, y, reduction="sum"), reduction="sum", null_draws=0)
    for key, factor in (("xx", 1), ("hh", 1), ("xv", 5), ("hv", 5), ("vv", 25)):
        close(factor * getattr(total, key), getattr(mean, key))


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


# Nothing changes -----------------------------------------------------------------------------------------


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


def test_no_graph_is_kept() -> None:
    """Neither after measuring nor, of the batch before, while the next one runs."""
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
    assert len(alive) == 6
    assert left_over == [0] * 7


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


# Chance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kernel"), [("conv", "full"), ("conv", "center"), ("tokens", "full")])
def test_draws_share_a_sign_per_image_or_sequence(name: str, kernel: str) -> None:
    """Of one image a draw is ±N; of two, with N = a + b, it is ±N or ±(a − b)."""
    net = NETS[name]()
    model, batches = net.model(), net.batches(1)
    moments = at(model, batches, quartic, kernel=kernel, null_draws=5)
    assert moments.xr.abs().max() > 1e-8
    for draw in moments.null:
        close(draw.abs(), moments.xr.abs(), 1e-6)
    model, batches = net.model(), net.batches(2)
    moments = at(model, batches, quartic, kernel=kernel, null_draws=24)
    kinds: list[Tensor] = []
    for draw in moments.null:
        if not any(torch.allclose(draw, sign * kind, atol=1e-12) for kind in kinds for sign in (1, -1)):
            kinds.append(draw)
    assert len(kinds) == 2
    assert any(torch.allclose(kind.abs(), moments.xr.abs(), atol=1e-10) for kind in kinds)


def test_draws_vary_and_have_no_mean() -> None:
    """Over many draws, their mean square is the sum over rows of the squares of x v⊥ᵀ."""
    net = NETS["linear"]()
    model, batches = net.model(), net.batches(40)
    moments = at(model, batches, quartic, null_draws=4000)
    x = rows(batches[0][0], True)
    h = F.relu(net.producer(batches[0][0])).detach()
    z = net.consumer(h)
    v = -40 * torch.autograd.grad(quartic(torch.tanh(z), None), z)[0]
    h = rows(h, True)
    rest = v - h @ torch.linalg.lstsq(h, v).solution
    each = torch.einsum("np,nr->npr", x, rest) / 40
    close(moments.null.square().mean(0), each.square().sum(0), 0.12)
    assert moments.null.mean(0).abs().max() < 5 * each.square().sum(0).sqrt().max() / 4000**0.5


# Adding, moving, saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kernel"), [("linear", "full"), ("tokens", "full"), ("conv", "center"), ("conv, norm", "center")]
)
def test_moments_add(name: str, kernel: str) -> None:
    net = NETS[name]()
    model, batches = net.model(), net.batches(6, 11, 4)
    options = {"kernel": kernel, "null_draws": 0}
    whole = at(model, batches, quartic, **options)
    parts = at(model, batches[:1], quartic, **options) + at(model, batches[1:], quartic, **options)
    assert parts.count == whole.count
    assert parts.tensors().keys() == whole.tensors().keys()
    assert {"xx", "xh", "xv", "hh", "hv", "vv"} <= parts.tensors().keys()
    for key, value in whole.tensors().items():
        close(getattr(parts, key), value)


def test_second_passes_add_only_with_one_update() -> None:
    net = NETS["conv"]()
    model, batches = net.model(), net.batches(6, 11)
    one, other = (at(model, [batch], quartic) for batch in batches)
    with pytest.raises(ValueError, match=r"dW\*"):
        one + other
    again = at(model, batches[:1], quartic)
    for key, value in (one + again).tensors().items():
        close(value, getattr(one, key))


@pytest.mark.parametrize("change", ["site", "kernel", "shape", "what"])
def test_moments_of_different_things_do_not_add(change: str) -> None:
    net = NETS["conv"]()
    batches = net.batches(6)
    one = at(net.model(), batches, quartic, kernel="center", null_draws=0)
    other = {
        "site": dataclasses.replace(one, site=GrowthSite("other", "2", ("1",))),
        "kernel": dataclasses.replace(one, kernel="full"),
        "shape": dataclasses.replace(one, vv=one.vv[:2, :2]),
        "what": dataclasses.replace(one, xh=None),
    }[change]
    with pytest.raises(ValueError, match="moments"):
        one + other
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]


@pytest.mark.parametrize("name", ["linear", "conv, norm", "flatten"])
def test_moments_save_and_load(name: str, tmp_path: Path) -> None:
    net = NETS[name]()
    moments = at(net.model(), net.batches(6, 11), quartic)
    path = tmp_path / "site.moments"
    moments.save(path)
    loaded = Moments.load(str(path))
    for field in dataclasses.fields(Moments):
        saved, read_back = getattr(moments, field.name), getattr(loaded, field.name)
        assert type(saved) is type(read_back), field.name
        if isinstance(saved, Tensor):
            assert saved.dtype == read_back.dtype
            assert torch.equal(saved, read_back)
        else:
            assert saved == read_back, field.name
    assert os.listdir(tmp_path) == ["site.moments"]
    one, other = (gk.solve(m, neurons=2) for m in (moments, loaded))
    assert torch.equal(one.alpha, other.alpha)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    net = NETS["linear"]()
    path = tmp_path / "moments"
    at(net.model(), net.batches(6), quartic).save(path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"path: .*moments"):
            Moments.load(path)
    path.write_text("not a file of tensors, but long enough to hold a length")
    with pytest.raises(ValueError, match=r"path: .*moments"):
        Moments.load(path)
    save_file({"xx": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"path: .*moments"):
        Moments.load(path)
    save_file({"xx": torch.ones(2)}, path, metadata={"growkern.moments": json.dumps({"site": "a"})})
    with pytest.raises(ValueError, match=r"path: .*moments"):
        Moments.load(path)
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "nothing")


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETS["linear"]()
    path = tmp_path / "moments"
    moments = at(net.model(), net.batches(6), quartic)
    moments.save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        dataclasses.replace(moments, count=99).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["moments"]


def test_moments_to() -> None:
    net = NETS["conv, norm"]()
    moments = at(net.model(), net.batches(6), quartic)
    single = moments.to(torch.float32)
    assert {t.dtype for t in single.tensors().values()} == {torch.float32}
    assert {t.dtype for t in moments.tensors().values()} == {F64}
    for key, value in moments.tensors().items():
        assert torch.equal(getattr(single, key), value.float())
    assert (single.site, single.count, single.slope) == (moments.site, moments.count, moments.slope)
    assert moments.to("meta").xx.is_meta


# Errors --------------------------------------------------------------------------------------------------

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
    "triple": (mlp, {"batches": [(torch.randn(4, 6), torch.zeros(4), torch.zeros(4))]}, "batches: .*pairs"),
    "dict": (mlp, {"batches": [{"x": torch.randn(4, 6), "y": torch.zeros(4)}]}, "batches: .*pairs"),
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
    with pytest.raises((TypeError, ValueError), match=r"sites?\b.*GrowthSite"):
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


# Several processes ---------------------------------------------------------------------------------------


def _worker(rank: int, folder: str) -> None:
    """One of two processes: measure every other batch, then a batch that is NaN in the second process only."""
    from datetime import timedelta

    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", store, timedelta(seconds=8), world_size=2, rank=rank)
    report: dict[str, str] = {}
    try:
        for name in ("conv", "linear"):
            torch.manual_seed(0)
            net = NETS[name]()
            model, batches = net.model(), net.batches(6, 11, 4, 5)
            moments = at(model, batches[rank::2], quartic, null_draws=3, group=dist.group.WORLD)
            moments.save(f"{folder}/{name}{rank}")
        batches = [(x * (torch.nan if rank else 1), y) for x, y in batches[rank::2]]
        for key, pairs in (("nan", batches), ("nothing", [] if rank else batches)):
            try:
                gk.collect(model, [moments.site], pairs, quartic, group=dist.group.WORLD)
            except ValueError as error:
                report[key] = f"ValueError: {error}"
            except RuntimeError as error:
                report[key] = f"RuntimeError: {error}"
    finally:
        Path(folder, f"report{rank}").write_text(json.dumps(report))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(rank, str(folder))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        if worker.is_alive():
            worker.kill()
            worker.join()
    return folder


@pytest.mark.check("two processes (gloo)")
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_group_gives_the_sums_of_all_processes(name: str, two_processes: Path) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    model, batches = net.model(), net.batches(6, 11, 4, 5)
    expected = at(model, batches, quartic, null_draws=3)
    found = [Moments.load(two_processes / f"{name}{rank}") for rank in range(2)]
    for key, value in expected.tensors().items():
        assert torch.equal(getattr(found[0], key), getattr(found[1], key)), key
        if not key.startswith("null"):
            close(getattr(found[0], key), value, 1e-9)
    assert {m.count for m in found} == {26}


@pytest.mark.check("two processes (gloo)")
@pytest.mark.parametrize("case", ["nan", "nothing"])
def test_all_processes_learn_of_an_error_in_one(case: str, two_processes: Path) -> None:
    """Or the others would wait for it in vain."""
    reports = [json.loads((two_processes / f"report{rank}").read_text()) for rank in range(2)]
    outcomes = {report.get(case, "fine").split(":")[0] for report in reports}
    assert outcomes == {"ValueError"} or (case == "nothing" and outcomes == {"fine"}), reports
