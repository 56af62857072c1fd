"""Data sets: idx and CIFAR-10 files as published, and every way in which they can be missing or damaged."""

from __future__ import annotations

import gzip
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from growkern.training.batches import Batches, choose_device, count_samples, first_batch, seed_all, take
from growkern.training.data import load

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (12, 5, 4), np.uint8), "t10k": RNG.integers(0, 256, (6, 5, 4), np.uint8)}
LABELS = {part: np.arange(len(images), dtype=np.uint8) % 10 for part, images in IMAGES.items()}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in IMAGES:
        for name, array in (("images-idx3", IMAGES[part]), ("labels-idx1", LABELS[part])):
            path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))


@pytest.mark.parametrize(("place", "packed"), [(".", True), (".", False), ("FashionMNIST/raw", False)])
def test_idx_files(tmp_path: Path, place: str, packed: bool) -> None:
    write_idx(tmp_path / place, packed)
    images = load("fashion-mnist", tmp_path)
    x, y = images.train
    assert (x.shape, x.dtype, y.dtype) == ((12, 1, 5, 4), torch.float32, torch.int64)
    assert torch.equal(y, torch.from_numpy(LABELS["train"]).long())
    raw = torch.from_numpy(IMAGES["train"]).double()
    for mine, file in ((x, "train"), (images.test[0], "t10k")):
        expected = (torch.from_numpy(IMAGES[file]).double() - raw.mean()) / raw.std()
        assert (mine[:, 0].double() - expected).abs().max() < 1e-6


def damaged(folder: Path, how: str) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated archive":
        path.write_bytes(content[:-20])
    elif how == "no archive":
        path.write_bytes(b"nothing of the kind")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "short":
        path.write_bytes(gzip.compress(idx(IMAGES["train"])[:-1]))
    elif how == "labels instead":
        path.write_bytes(gzip.compress(idx(LABELS["train"])))
    elif how == "other count":
        path.write_bytes(gzip.compress(idx(IMAGES["train"][:-1])))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"data_root: no file train-images-idx3-ubyte.gz or train-images-idx3-ubyte in .*--download"),
        ("truncated archive", "data_root: cannot read .*train-images"),
        ("no archive", "data_root: cannot read .*train-images"),
        ("empty", "data_root: cannot read .*train-images"),
        ("short", "announces 240 bytes and holds 239"),
        ("labels instead", "no idx file of bytes with 3 dimensions"),
        ("other count", "holds 11 train images and 12 labels"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, how: str, message: str) -> None:
    write_idx(tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp_path)


def test_cifar_binary(tmp_path: Path) -> None:
    rows = {f"data_batch_{i}.bin": RNG.integers(0, 10, (2, 3073), np.uint8) for i in range(1, 6)}
    rows["test_batch.bin"] = RNG.integers(0, 10, (3, 3073), np.uint8)
    for name, data in rows.items():
        (tmp_path / name).write_bytes(data.tobytes())
    images = load("cifar10", tmp_path)
    assert (images.train[0].shape, images.test[0].shape) == ((10, 3, 32, 32), (3, 3, 32, 32))
    assert images.train[1][2:4].tolist() == rows["data_batch_2.bin"][:, 0].tolist()
    raw = torch.from_numpy(np.stack([rows[f"data_batch_{i}.bin"][:, 1:] for i in range(1, 6)])).double()
    planes = raw.view(10, 3, 32, 32)
    expected = (planes - planes.mean((0, 2, 3), keepdim=True)) / planes.std((0, 2, 3), keepdim=True)
    assert (images.train[0] - expected).abs().max() < 1e-6
    (tmp_path / "data_batch_3.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match="5 bytes, which is no multiple of 3073"):
        load("cifar10", tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match="no file data_batch_3\\.bin"):
        load("cifar10", tmp_path)


def test_digits_and_held_out_images() -> None:
    images = load("digits", Path("nowhere"))
    assert (images.train[0].shape, images.test[0].shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    held = images.held_out()
    assert (len(held.train[0]), len(held.test[0])) == (1198, 239)
    assert torch.equal(torch.cat([held.train[0], held.test[0]]), images.train[0])


def test_batches_visit_every_sample_once_in_a_new_order() -> None:
    inputs, targets = torch.arange(10.0)[:, None], torch.arange(10)
    batches = Batches(inputs, targets, 4, torch.Generator().manual_seed(0))
    passes = [torch.cat([t for _, t in batches]) for _ in range(2)]
    assert all(torch.equal(p.sort().values, targets) for p in passes)
    assert not torch.equal(*passes)
    assert (len(batches), count_samples(batches), [len(t) for _, t in batches]) == (3, 10, [4, 4, 2])
    assert torch.equal(torch.cat([t for _, t in Batches(inputs, targets, 3)]), targets)


def test_random_numbers_depend_on_seed_and_epoch_alone() -> None:
    batches = Batches(torch.arange(10.0), torch.arange(10), 4, torch.Generator())
    drawn = []
    for epoch in (1, 2, 1):
        seed_all(7, epoch, batches)
        first = first_batch(batches, torch.device("cpu"))[1]
        drawn.append((first.tolist(), torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))
    with pytest.raises(ValueError, match="train: it holds no batch"):
        first_batch([], torch.device("cpu"))


def test_take_and_devices() -> None:
    batches = [(torch.zeros(4), torch.zeros(4)) for _ in range(5)]
    assert [len(take(batches, n)) for n in (1, 4, 5, 100)] == [1, 1, 2, 5]
    for wrong, got in ((torch.zeros(4, 2), "Tensor"), ([1, 2, 3], "list of 3")):
        with pytest.raises(ValueError, match=rf"train: expected \(input, target\) pairs, .* got {got}"):
            take([wrong], 1)
    with pytest.raises(ValueError, match="train: expected a tensor among the inputs, got str"):
        take([("text", 1)], 1)
    assert choose_device("cpu") == torch.device("cpu")
    for wrong in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device: '{wrong}' cannot be used here"):
            choose_device(wrong)
