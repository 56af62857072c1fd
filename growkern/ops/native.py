"""The compiled libraries: each defines ops in a private namespace of torch.ops."""

import logging
from pathlib import Path

import torch

__all__ = ["build_info", "load"]

logger = logging.getLogger(__name__)


def load(name: str) -> bool:
    """Load a compiled library of the package; that for CUDA only where torch was built with CUDA.

    Parameters
    ----------
    name : str
        ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    bool
        Whether it was built and could be loaded; if it could not, the reason is logged.
    """
    paths = sorted(Path(__file__).parents[1].glob(f"_{name}.*"))
    if name == "cuda" and torch.version.cuda is None:
        return False
    for path in paths:
        try:
            torch.ops.load_library(path)
        except OSError as error:  # built for another torch or CUDA
            logger.warning("growkern was built for another torch and goes on without %s: %s", path.name, error)
            return False
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
