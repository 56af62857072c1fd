"""Tasks of one's own: every kind of data that a user may bring, interrupted and resumed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_training_run import SMALL, Interrupted, StopAt, assert_same_outcome, outcome
from torch import nn

from growkern.training import Settings, Task, resume, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_task_of_ones_own_with_datasets_and_numpy_randomness(tmp_path: Path) -> None:
    source = """
import numpy as np, torch, random
from torch import nn
from torch.utils.data import Dataset
from growkern.training import Task

class Noisy(Dataset):
    def __len__(self): return 60
    def __getitem__(self, i):
        noise = 0.1 * np.random.randn(5) + 0.01 * random.random()
        return torch.tensor(np.sin(i + np.arange(5)) + noise, dtype=torch.float32), torch.tensor([i / 60.0])

def make():
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.2), nn.Tanh(), nn.Linear(3, 1))
    return Task(model, Noisy(), Noisy(), nn.functional.mse_loss)
"""
    (tmp_path / "own.py").write_text(source)
    settings = Settings(
        target=f"{tmp_path / 'own.py'}:make",
        epochs=4,
        schedule="every:1",
        neurons="2",
        measured=40,
        batch=16,
        threads=1,
    )

    whole = train(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "parts", [StopAt(2)])
    assert_same_outcome(outcome(resume(tmp_path / "parts")), outcome(whole))
    assert "accuracy" not in whole.records("metrics.jsonl")[-1]
    assert whole.records("metrics.jsonl")[-1]["widths"]["0"] > 3


OWN = """
import growkern
import torch
from collections import namedtuple
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset
from growkern.training import Task

torch.manual_seed(0)
X, Y = torch.randn(120, 5), torch.randint(3, (120,))
DATA = TensorDataset(X, Y)
Pair = namedtuple("Pair", "one two")
SITES = [growkern.GrowthSite("net.0", "net.2", ("net.1",))]

def model():
    return nn.Sequential(nn.Linear(5, 2), nn.ReLU(), nn.Linear(2, 3))

class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = model()
    def forward(self, data):
        return self.net(data["x"])

class OfTwo(OfDict):
    def forward(self, one, two):
        return self.net(one + two)

def sampler(): return model(), DataLoader(DATA, 16, sampler=RandomSampler(DATA, generator=torch.Generator()))
def workers(): return model(), DataLoader(DATA, 16, shuffle=True, num_workers=1)
def subset(): return model(), DataLoader(DATA, 10, sampler=SubsetRandomSampler(range(25)), drop_last=True)
def dictionaries():
    batches = [({"x": x}, {"y": y}) for x, y in zip(X.split(30), Y.split(30))]
    return Task(OfDict(), batches, batches, lambda z, t: nn.functional.cross_entropy(z, t["y"]), SITES)
def tuples():
    batches = [(Pair(x, x), y) for x, y in zip(X.split(30), Y.split(30))]
    return OfTwo(), batches, batches
def no_targets():
    batches = [(x, None) for x in X.split(30)]
    return model(), batches, batches, lambda z, _: z.square().mean()
class Stream(IterableDataset):
    def __iter__(self): return iter([(x, y) for x, y in DATA])
def stream(): return model(), Stream()
def late():
    import helper_of_own
    return model(), DATA
"""


@pytest.mark.parametrize(
    ("function", "samples"),
    [
        *(("sampler", 120), ("workers", 120), ("subset", 20), ("dictionaries", 120), ("tuples", 120)),
        *(("no_targets", 120), ("stream", 120), ("late", 120)),
    ],
)
def test_tasks_of_many_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, samples: int) -> None:
    """Each is interrupted and goes on bit-identically; the cost per sample is that of the model alone."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # later processes would import queue.py from there
    (tmp_path / "queue.py").write_text(OWN)  # the name of a standard module
    (tmp_path / "helper_of_own.py").write_text("")
    settings = Settings(
        **SMALL | {"target": f"{tmp_path / 'queue.py'}:{function}", "schedule": "1", "epochs": 4, "batch": 16}
    )
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "parts", [StopAt(2)] if samples > 20 else [StopAt(1)])
    assert_same_outcome(outcome(resume(tmp_path / "parts")), outcome(whole))
    assert whole.records("growth.jsonl")
    per_sample = 2 * (5 * 2 + 2 * 3) + 2 * 3  # forward, gradients of both weights, and of the hidden layer
    assert whole.records("metrics.jsonl")[0]["compute"] == pytest.approx(per_sample)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no model", []), "model: expected an nn.Module, got str"),
        ((nn.Linear(2, 2), iter([])), "train: expected a Dataset, or batches that can be read more than once"),
        ((nn.Linear(2, 2), [], 3), "test: expected a Dataset, or batches that can be read more than once"),
    ],
)
def test_wrong_tasks(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(*arguments)
