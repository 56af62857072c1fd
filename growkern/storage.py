"""Files of tensors and facts without pickle: safetensors with JSON, replaced as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_KEY = "growkern"


def write(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-serialisable facts to one file; an earlier one stays until the new one is complete."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory, as tied weights do
        if tensor.untyped_storage().data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    header = {"kind": kind, "facts": facts, "sha256": _digest(tensors, kind, facts)}
    replace(path, save(tensors, metadata={_KEY: json.dumps(header)}))


def replace(path: str | os.PathLike[str], content: bytes) -> None:
    """Give a file new content: written, forced to the disk, then renamed over the old one."""
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote.

    Parameters
    ----------
    path : path
        The file.
    kind : str
        What it must hold.

    Returns
    -------
    tuple
        Tensors, on the CPU, and facts.

    Raises
    ------
    ValueError
        If the file is incomplete, was changed since, or is not a file of this kind.
    """
    try:
        content = Path(path).read_bytes()  # not mapped: tensors must outlive what happens to the file
        tensors = load(content)
        header = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][_KEY])
        if header["kind"] != kind:
            error: object = f"it holds {header['kind']}"
        elif header["sha256"] != _digest(tensors, kind, header["facts"]):
            error = "its content does not have the checksum that was written with it"
        else:
            return tensors, header["facts"]
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as caught:
        error = caught
    raise ValueError(f"path: {os.fspath(path)} is not a complete file of growkern {kind} ({error})")


def _digest(tensors: dict[str, Tensor], kind: str, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([kind, facts], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()
