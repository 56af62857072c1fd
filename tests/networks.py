"""Two layers with all that may lie between them, and how tests measure them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from conftest import F64
from torch import Tensor, nn

import growkern as gk
from growkern import Moments
from growkern.draws import Draws

Batches = list[tuple[Any, Any]]


def quartic(z: Tensor, _: Any) -> Tensor:
    return z.pow(4).mean() + z.mean()


def at(model: nn.Module, batches: Batches, loss_fn: Callable[..., Tensor], **options: Any) -> Moments:
    """Moments of the first site of a model."""
    sites = gk.find_sites(model, batches[0][0])[:1]
    return gk.collect(model, sites, batches, loss_fn, **options)[sites[0].name]


def sign_of_rows(draws: int, batches: list[int], run: int = 1, seed: int = 0) -> Tensor:
    """Signs (draws, rows) of batches of so many rows: of each class and run what `Draws` takes, times H_dj."""
    source, found = Draws(draws, 1, sum(batches), seed), []
    of_classes = sign_matrix(draws, source.classes)
    for size in batches:
        for number, part, signs, _ in source.parts(size, run):
            of_rows = signs.to(F64).repeat_interleave(run, 1)[:, : part.stop - part.start]
            found.append(of_classes[:, number : number + len(signs)] @ of_rows)
    return torch.cat(found, 1)


def sign_matrix(draws: int, classes: int) -> Tensor:
    """Signs (draws, classes) of the sums of classes in each draw: of the bits that d and j share."""
    return torch.tensor([[(-1.0) ** (d & j).bit_count() for j in range(classes)] for d in range(draws)], dtype=F64)


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
    x = F.pad(x, zeros_around(layer))
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, d, s in zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    ]
    out = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).unflatten(2, size)
    return torch.cat([out, torch.ones_like(out[:, :1])], 1) if layer.bias is not None else out


def zeros_around(layer: nn.Conv2d) -> list[int]:
    around: list[int] = []
    for axis in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            around += [total // 2, total - total // 2]
        else:
            around += [0, 0] if layer.padding == "valid" else [layer.padding[axis]] * 2
    return around


def rows(t: Tensor, ones: bool) -> Tensor:
    t = t.reshape(-1, t.shape[-1])
    return torch.cat([t, torch.ones_like(t[:, :1])], 1) if ones else t


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


def asserting(branches: bool = False) -> nn.Module:
    """A network whose forward pass asserts sizes, in a file whose assertions pytest does not rewrite."""

    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows, width = x.shape
            assert width <= 8, f"{width} features are too many"
            assert rows > 0 and width == 6  # noqa: PT018
            assert not x.dim() == 3
            if branches and rows > 3:
                x = x[:3]
            hidden = torch.relu(self.a(x))
            assert hidden.shape[1] >= 8
            return self.b(hidden)

    return Asserting()
