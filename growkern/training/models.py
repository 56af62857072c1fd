"""Small plain networks to grow. `width` sets every inner layer; what a residual stream carries never grows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STREAM = (16, 32, 64)  # channels of the residual stream, stage by stage


class Block(nn.Module):
    """Residual block with `width` inner channels: relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, inputs: int, outputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


def mlp(shape: tuple[int, ...], classes: int, width: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def cnn(shape: tuple[int, ...], classes: int, width: int) -> nn.Module:
    """Three 3×3 convolutions, each halving the map."""

    def block(inputs: int) -> tuple[nn.Module, ...]:
        layers = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
        return layers

    side = (shape[1] // 8) * (shape[2] // 8)
    return nn.Sequential(*block(shape[0]), *block(width), *block(width), nn.Flatten(), nn.Linear(width * side, classes))


def resnet(shape: tuple[int, ...], classes: int, width: int) -> nn.Module:
    """Three stages of two residual blocks on a stream of 16, 32 and 64 channels."""
    blocks, inputs = [], STREAM[0]
    for stage, outputs in enumerate(STREAM):
        blocks += [Block(inputs, outputs, width, 1 if stage == 0 else 2), Block(outputs, outputs, width, 1)]
        inputs = outputs
    stem = nn.Conv2d(shape[0], STREAM[0], 3, 1, 1, bias=False), nn.BatchNorm2d(STREAM[0]), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(STREAM[-1], classes))


def build(name: str, shape: tuple[int, ...], classes: int, width: int, seed: int) -> nn.Module:
    """Build a network by name, with weights that depend on the seed alone.

    Parameters
    ----------
    name : str
        "mlp", "cnn" or "resnet".
    shape : tuple of int
        Of one image, (C, H, W).
    classes : int
        Number of outputs.
    width : int
        Units of every inner layer.
    seed : int
        Of the weights.

    Returns
    -------
    nn.Module
        A plain model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {"mlp": mlp, "cnn": cnn, "resnet": resnet}[name](shape, classes, width)
