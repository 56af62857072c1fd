"""Which tiles the Triton kernels use: what was tuned on this machine, or shipped for the GPU, or a default."""

import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch

from growkern.ops.moments import group
from growkern.ops.moments.schedule import Tiles

__all__ = ["choose", "tuned_path", "write_tuned"]

SHIPPED = Path(__file__).with_name("tiles.json")

logger = logging.getLogger(__name__)

Entries = list[dict[str, Any]]


def tuned_path() -> Path:
    """Name the file in the user's cache in which `growkern tune` keeps what it found."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"  # Triton, whose tiles these are, is for Linux
    return Path(cache) / "growkern" / "tiles.json"


@functools.lru_cache(maxsize=1024)
def choose(gpu: tuple[str, str], kind: str, operands: str, width: int) -> Tiles:
    """Choose the tiles of the nearest width for which there are some.

    Parameters
    ----------
    gpu : (str, str)
        Its name, and its kind: "capability 9" for one of NVIDIA's, "hip" for one of AMD's.
    kind : str
        "matrix" or "map".
    operands : str
        "ieee" or "tf32" for float32, "half".
    width : int
        Channels of the widest source.

    Returns
    -------
    Tiles
        Tuned on this machine for about this width, else shipped for this GPU, for its kind, or for any.
    """
    shipped = _shipped()
    near = [entry for entry in _tuned().get(gpu[0], []) if width / 2 <= entry["width"] <= max(16, width * 2)]
    for entries in (near, shipped.get(gpu[0], []), shipped.get(gpu[1], [])):
        if found := _nearest(entries, kind, operands, width):
            return found
    found = _nearest(shipped["any"], kind, operands, width)
    assert found is not None
    return found


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return (*entry["kinds"], entry["operands"], entry["width"])


def _nearest(entries: Entries, kind: str, operands: str, width: int) -> Tiles | None:
    fitting = [entry for entry in entries if entry["operands"] == operands and kind in entry["kinds"]]
    if not fitting:
        return None
    nearest = min(fitting, key=lambda entry: abs(math.log2(entry["width"] / max(1, width))))
    return Tiles(**nearest["tiles"])


def write_tuned(name: str, entries: Entries) -> Path:
    """Keep the entries of one GPU in the user's cache, in place of those for the same kind, operands and width.

    Parameters
    ----------
    name : str
        Name of the GPU.
    entries : list of dict
        With "kinds", "operands", "width" and "tiles".

    Returns
    -------
    Path
        The file.
    """
    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {_key(entry): entry for entry in [*_tuned().get(name, []), *entries]}
    path.write_text(json.dumps(_tuned() | {name: list(kept.values())}, indent=1) + "\n")
    _tuned.cache_clear()
    choose.cache_clear()
    group.forget()
    return path


@functools.cache
def gpu_of(device: torch.device) -> tuple[str, str]:
    """Name a GPU and its kind; without one, what the kernels are compiled for in tests."""
    if device.type != "cuda":
        return "", "capability 9"
    name = torch.cuda.get_device_name(device)
    return name, "hip" if torch.version.hip else f"capability {torch.cuda.get_device_capability(device)[0]}"


@functools.cache
def _shipped() -> dict[str, Entries]:
    return json.loads(SHIPPED.read_text())


@functools.cache
def _tuned() -> dict[str, Entries]:
    path = tuned_path()
    try:
        table = json.loads(path.read_text())
        for entries in table.values():
            for entry in entries:
                Tiles(**entry["tiles"])
                _ = entry["kinds"], entry["operands"], math.log2(entry["width"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is not what `growkern tune` writes, and is ignored (%s)", path, error)
        return {}
    return table
