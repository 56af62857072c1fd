"""Measuring: moments and gradients against explicit sums and automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import F64, FAMILIES, close
from networks import NETS, Batches, Net, at, patches, quartic, rows, zeros_around
from torch import Tensor, nn

import growkern as gk

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

# An explicit measurement ---------------------------------------------------------------------------------

KERNELS = [(name, "full") for name in NETS]
KERNELS += [(name, "center") for name in NETS if name.startswith(("conv", "pool", "max"))]


def read(maps: Tensor, layer: nn.Conv2d) -> list[Tensor]:
    """For each kernel offset of a convolution, what it reads of the maps at each output: (B, p, Ho, Wo)."""
    maps = F.pad(maps, zeros_around(layer))
    (kh, kw), (sy, sx), (dy, dx) = layer.kernel_size, layer.stride, layer.dilation
    height, width = (
        (n - d * (k - 1) - 1) // s + 1 for n, k, d, s in zip(maps.shape[2:], (kh, kw), (dy, dx), (sy, sx), strict=True)
    )
    return [maps[:, :, i * dy :: sy, j * dx :: sx][:, :, :height, :width] for i in range(kh) for j in range(kw)]


def explicit(
    net: Net, batches: Batches, loss_fn: Callable[..., Tensor], kernel: str, signs: Tensor | None = None
) -> dict[str, Tensor]:
    """Moments of a Net by the letter: sums over batches of samples written out, over images or rows.

    v is −∂L/∂z of a loss that is a mean over the samples of a batch, times their number. Signs (draws, images or rows)
    are those of "null" and "null_h".
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
    if signs is not None:
        each = signs.repeat_interleave(len(h) // signs.shape[1], 1)
        sums["null"] = torch.einsum("dn,onp,nr->dpro", each, x, v - h @ update).flatten(2)
        sums["null_h"] = torch.einsum("dn,nq,nr->dqr", each, h, v - h @ update)
    result = {name: value / images for name, value in sums.items()}
    if inputs:
        uniform = torch.cat([t.movedim(1, 3).flatten(0, 2) for t in inputs])
        result |= {"x_mean": uniform.mean(0), "x_second": uniform.T @ uniform / len(uniform)}
    return result


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
        return z + F.conv2d(F.pad(x, zeros_around(consumer)), weight, None, consumer.stride, 0, consumer.dilation)

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


@pytest.mark.parametrize("bias", [True, False])
def test_uniform_moments_of_sites_in_a_row_are_those_of_each_alone(bias: bool) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 3), (3, 4), (4, 3)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:6], nn.MaxPool2d(2), *layers[6:], nn.Conv2d(3, 2, 3)).double().eval()
    batches = [(torch.randn(5, 2, 10, 9).double(), torch.randn(5, 2, 3, 2).double()) for _ in range(2)]
    sites = gk.find_sites(model, batches[0][0])
    assert len(sites) == 3
    together = gk.collect(model, sites, batches, F.mse_loss, null_draws=0)
    for site in sites:
        (alone,) = gk.collect(model, site, batches, F.mse_loss, null_draws=0).values()
        for name, value in alone.tensors().items():
            close(together[site.name].tensors()[name], value)
