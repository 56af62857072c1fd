"""Batches: where they come from, how many there are, and where they go."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from growkern.batches import leaves, pair, to_device


class Batches:
    """Shuffled batches of tensors in memory, in a new order on every pass.

    Parameters
    ----------
    inputs, targets : Tensor
        Samples along the first dimension.
    size : int
        Samples in a batch; the last one of a pass may hold fewer.
    generator : torch.Generator, optional
        Where the order comes from; without one the order is that of the samples.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator | None = None) -> None:
        self.inputs, self.targets, self.size, self.generator = inputs, targets, size, generator

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.inputs)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for chosen in order.to(self.inputs.device).split(self.size):
            yield self.inputs[chosen], self.targets[chosen]


def choose_device(name: str) -> torch.device:
    """Find the device of a name; "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def batch_size(inputs: Any) -> int:
    """Count the samples of a batch: the length of the first tensor of its inputs."""
    for tensor in leaves(inputs):
        return len(tensor)
    raise ValueError(f"train: expected a tensor among the inputs, got {type(inputs).__name__}")


def seed_all(seed: int, epoch: int, batches: Any) -> None:
    """Start all random numbers anew from a seed and an epoch: torch's, numpy's, Python's and those of the batches."""
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    torch.manual_seed(state)
    np.random.seed(state)  # noqa: NPY002  (a user's data set may draw from it)
    random.seed(state)
    for owner in (batches, *(getattr(batches, name, None) for name in ("sampler", "batch_sampler"))):
        for each in (owner, getattr(owner, "sampler", None)):
            if isinstance(generator := getattr(each, "generator", None), torch.Generator):
                generator.manual_seed(state)


def first_batch(batches: Iterable[tuple[Any, Any]], device: torch.device) -> tuple[tuple[Any, ...], Any]:
    """Read the arguments of the model, and the target, of the first batch of a pass over the data."""
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("train: it holds no batch")
    return to_device(batch, device, "train")


def count_samples(batches: Any) -> int:
    """Count the samples of one pass over the data."""
    if isinstance(batches, Batches):
        return len(batches.inputs)
    sampler: Any = getattr(batches, "sampler", None)
    if isinstance(batches, DataLoader) and batches.batch_size and hasattr(sampler, "__len__"):
        return len(sampler) // batches.batch_size * batches.batch_size if batches.drop_last else len(sampler)
    return sum(batch_size(inputs) for inputs, _ in batches)


def take(batches: Iterable[tuple[Any, Any]], samples: int) -> list[tuple[Any, Any]]:
    """Read the first batches that hold so many samples together."""
    chosen, seen = [], 0
    for batch in batches:
        chosen.append(pair(batch, "train"))
        seen += batch_size(batch[0])
        if seen >= samples:
            break
    return chosen
