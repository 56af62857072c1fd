"""The compiled libraries: each defines ops in a private namespace of torch.ops."""

from pathlib import Path

import torch

__all__ = ["build_info", "load"]


def load(name: str) -> bool:
    """Load a compiled library of the package.

    Parameters
    ----------
    name : str
        ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    bool
        Whether it was built.
    """
    paths = sorted(Path(__file__).parents[1].glob(f"_{name}.*"))
    for path in paths:
        torch.ops.load_library(path)
    return bool(paths)


def build_info() -> dict[str, object] | None:
    """Tell what the libraries were built with.

    Returns
    -------
    dict or None
        Compiler, flags, instruction sets and CUDA architectures; None for the pure package.
    """
    try:
        from growkern import _host  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _host.build_info()
