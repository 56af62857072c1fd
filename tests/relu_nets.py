"""A regression that a hidden layer of 12 ReLU units made, and a narrow network for it."""

import torch
from torch import nn


def problem(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=g)
    hidden = torch.relu(x @ torch.randn(8, 12, generator=g))
    return x, hidden @ torch.randn(12, 4, generator=g) / 3


def batches(parts=3):
    x, y = problem()
    return list(zip(x.split([100, 100, 200][:parts]), y.split([100, 100, 200][:parts]), strict=False))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Dropout(0.1), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
