"""Data sets in memory: handwritten digits, (Fashion-)MNIST from idx files, CIFAR-10 from its binary files."""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Labelled images, normalised to mean 0 and deviation 1 over the training images.

    Attributes
    ----------
    train, test : tuple of Tensor
        Images (n, C, H, W), float32, and labels (n,).
    classes : int
        Number of labels.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int = 10

    def held_out(self) -> Images:
        """Put the last sixth of the training images in the place of the test images."""
        x, y = self.train
        kept = len(x) - len(x) // 6
        return Images((x[:kept], y[:kept]), (x[kept:], y[kept:]), self.classes)


def load(dataset: str, root: Path, download: bool = False) -> Images:
    """Read a data set.

    Parameters
    ----------
    dataset : str
        "digits" (in scikit-learn), "fashion-mnist", "mnist" or "cifar10".
    root : Path
        Folder of its files: idx files (.gz or unpacked), or data_batch_*.bin and test_batch.bin, in it or in the
        subfolder where torchvision puts them.
    download : bool
        Let torchvision fetch what is missing.

    Returns
    -------
    Images
        All of it.

    Raises
    ------
    ValueError
        If files are missing or damaged; the message names them.
    """
    if dataset == "digits":
        return _digits()
    names = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
    if download:
        _download(names[dataset], root)
    read = _cifar10 if dataset == "cifar10" else _idx_files
    (x, y), (x_test, y_test) = read(root, names[dataset])
    return _normalised(x, y, x_test, y_test)


def _digits() -> Images:
    """1,437 training and 360 test images of 8 × 8."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError("dataset: digits come with scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in split)
    return _normalised(x.view(-1, 1, 8, 8), y, x_test.view(-1, 1, 8, 8), y_test)


def _normalised(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> Images:
    x, x_test = x.float(), x_test.float()
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return Images(((x - mean) / deviation, y.long()), ((x_test - mean) / deviation, y_test.long()))


def _download(name: str, root: Path) -> None:
    try:
        import torchvision
    except ImportError:
        raise ValueError("download: needs torchvision: pip install growkern[vision]") from None
    try:
        getattr(torchvision.datasets, name)(root, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"download: {name} could not be fetched to {root}: {error}") from None


def _find(root: Path, names: tuple[str, ...], folders: tuple[str, ...]) -> Path:
    for folder in (root, *(root / sub for sub in folders)):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise ValueError(
        f"data_root: no file {' or '.join(names)} in {root} (--download fetches it where there is a network)"
    )


def _idx_files(root: Path, name: str) -> list[tuple[Tensor, Tensor]]:
    """Images (n, 1, H, W) and labels of both parts."""
    parts = []
    for part in ("train", "t10k"):
        pair = []
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            stem = f"{part}-{kind}"
            path = _find(root, (f"{stem}.gz", stem), (f"{name}/raw", name))
            pair.append(_idx(path, 3 if "images" in kind else 1))
        images, labels = pair
        if len(images) != len(labels):
            raise ValueError(f"data_root: {root} holds {len(images)} {part} images and {len(labels)} labels")
        parts.append((images[:, None], labels))
    return parts


def _idx(path: Path, dimensions: int) -> Tensor:
    """Read an idx file of bytes: two zeros, a type, the number of dimensions, sizes (big-endian), then the data."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        zeros, kind, count = struct.unpack_from(">HBB", content)
        if (zeros, kind, count) != (0, 8, dimensions):
            raise ValueError(f"it is no idx file of bytes with {dimensions} dimensions")
        shape = struct.unpack_from(f">{count}I", content, 4)
        data = np.frombuffer(content, np.uint8, offset=4 + 4 * count)
        if len(data) != math.prod(shape):
            raise ValueError(f"it announces {math.prod(shape)} bytes and holds {len(data)}")
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise ValueError(f"data_root: cannot read {path}: {error}") from None
    return torch.from_numpy(data.reshape(shape).copy())


def _cifar10(root: Path, name: str) -> list[tuple[Tensor, Tensor]]:
    """Images (n, 3, 32, 32) and labels of both parts; rows of one label byte and 3,072 of colour planes."""
    if not any(root.glob("**/data_batch_1.bin")) and (root / "cifar-10-batches-py").is_dir():
        return _cifar10_of_torchvision(root)
    parts = []
    for names in ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]):
        rows = []
        for each in names:
            path = _find(root, (each,), ("cifar-10-batches-bin",))
            data = np.fromfile(path, np.uint8)
            if not len(data) or len(data) % 3073:
                raise ValueError(f"data_root: {path} holds {len(data)} bytes, which is no multiple of 3073")
            rows.append(torch.from_numpy(data.reshape(-1, 3073)))
        joined = torch.cat(rows)
        parts.append((joined[:, 1:].reshape(-1, 3, 32, 32), joined[:, 0]))
    return parts


def _cifar10_of_torchvision(root: Path) -> list[tuple[Tensor, Tensor]]:
    try:
        import torchvision
    except ImportError:
        raise ValueError(
            "data_root: cifar-10-batches-py is read by torchvision: pip install growkern[vision]"
        ) from None
    try:
        both = [torchvision.datasets.CIFAR10(root, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(f"data_root: {root}: {error}") from None
    return [(torch.from_numpy(each.data).permute(0, 3, 1, 2), torch.tensor(each.targets)) for each in both]
