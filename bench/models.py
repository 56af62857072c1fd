"""Plain networks whose growth is measured."""

import itertools

import torch
from torch import Tensor, nn

from growkern.training.models import Block

CLASSES = 10


def mlp(*widths: int) -> nn.Module:
    *hidden, last = itertools.pairwise((*widths, CLASSES))
    layers = [layer for pair in hidden for layer in (nn.Linear(*pair), nn.SELU())]
    model = nn.Sequential(*layers, nn.Linear(*last))
    for layer in model[::2]:  # which with SELU keeps the variance from layer to layer
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return model


def vgg13(stages: int, width: float) -> nn.Module:
    """The first stages of VGG-13 with batch norms, for 32×32 images; their channels are `width` times those of the
    original, and one linear layer classifies."""
    layers: list[nn.Module] = []
    before = 3
    for channels in channels_of_vgg(stages, width):
        for _ in range(2):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * (32 >> stages) ** 2, CLASSES))


def channels_of_vgg(stages: int, width: float) -> list[int]:
    return [int(width * channels) for channels in (64, 128, 256, 512, 512)[:stages]]


def resnet18(width: float, stages: int = 4) -> nn.Module:
    """ResNet-18 for small images, or its first stages; its blocks' inner channels are `width` times those of the
    residual stream."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    before = 64
    for stage, channels in enumerate((64, 128, 256, 512)[:stages]):
        for number in range(2):
            layers.append(Block(before, channels, int(width * channels), 2 if stage and not number else 1))
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))


class EncoderLayer(nn.Module):
    """Transformer layer that normalises first: attention, then a feed-forward of `hidden` units."""

    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.feed_forward(x)


class FeedForward(nn.Module):
    """x + linear2(gelu(linear1(norm(x))))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(nn.functional.gelu(self.linear1(self.norm(x))))


class Encoder(nn.Module):
    """Classifies the mean of the tokens that some Transformer layers make of a sequence of vectors."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def encoder(layers: int, width: int, heads: int, hidden: int) -> nn.Module:
    return Encoder([EncoderLayer(width, heads, FeedForward(width, hidden)) for _ in range(layers)], width)


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Put a model into evaluation mode, with batch norms that know their statistics of x."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
