"""Files of tensors and facts without pickle: safetensors with JSON, replaced as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_KEY = "growkern"


def write(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-serialisable facts to one file; an earlier one stays until the new one is complete."""
    content = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={_KEY: json.dumps({"kind": kind, "facts": facts})},
    )
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
        If the file is incomplete, or not a file of this kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            if header["kind"] == kind:
                return {name: file.get_tensor(name) for name in file.keys()}, header["facts"]
            error: object = f"it holds {header['kind']}"
    except (SafetensorError, KeyError, json.JSONDecodeError) as caught:
        error = caught
    raise ValueError(f"path: {os.fspath(path)} is not a complete file of growkern {kind} ({error})")
