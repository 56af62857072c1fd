"""Which implementation of an op runs: auto | triton | cuda | cpp | reference.

An op of `growkern.ops` has one schema and any number of implementations with that signature. Each registers
itself under the name of its backend in its own file; which of them to call is decided inside the op, at run
time, and so is never traced into a compiled graph.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["available", "define", "has_triton", "implementation", "register", "result_dtype", "use_backend"]

BACKENDS = ("triton", "cuda", "cpp", "reference")  # "auto" takes the first that an op has for the device
ACCEPTED = ("auto", *BACKENDS)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs on the CPU, slowly
# Devices that a backend takes; the reference takes all.
DEVICES = {"triton": ("cuda", "cpu") if INTERPRETED else ("cuda",), "cuda": ("cuda",), "cpp": ("cpu",)}

logger = logging.getLogger(__name__)

Implementation = TypeVar("Implementation", bound=Callable[..., Any])

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}

# One value for the process, not one per thread or context: autograd runs the backward hooks of CUDA tensors
# in threads of its own, and an op called there must see the choice made around the training step.
_chosen: str | None = None


def register(op: str, backend: str) -> Callable[[Implementation], Implementation]:
    """Make the decorated function the implementation of `op` for `backend`.

    Parameters
    ----------
    op : str
        Name of the op without its namespace, as in ``"linear_moments"``.
    backend : str
        One of ``"triton"``, ``"cuda"``, ``"cpp"``, ``"reference"``.

    Returns
    -------
    Callable
        A decorator that returns the function as it is.

    Raises
    ------
    ValueError
        If there is no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")

    def decorate(implementation: Implementation) -> Implementation:
        _implementations.setdefault(op, {})[backend] = implementation
        return implementation

    return decorate


def available(op: str) -> tuple[str, ...]:
    """Name the backends that implement `op`, in the order in which ``"auto"`` prefers them.

    Parameters
    ----------
    op : str
        Name of the op without its namespace.

    Returns
    -------
    tuple of str
        Backend names; empty where there is no such op.
    """
    return tuple(backend for backend in BACKENDS if backend in _implementations.get(op, {}) and _is_here(backend))


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton kernels can run here: Triton is installed, and a GPU is there or its interpreter is on.

    Returns
    -------
    bool
        Whether they can; nothing of Triton is imported to tell, but CUDA is asked for devices.
    """
    return importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of `growkern.ops` with one backend inside the ``with`` block.

    The choice is process-wide, nests, and goes before the environment variable ``GROWKERN_BACKEND``. An op
    that lacks the backend raises a RuntimeError when it is called.

    Parameters
    ----------
    name : str
        ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Yields
    ------
    None
        Nothing; the previous choice is back in force afterwards.

    Raises
    ------
    ValueError
        If there is no such backend.
    """
    global _chosen
    if name not in ACCEPTED:
        raise ValueError(f"use_backend: expected one of {', '.join(ACCEPTED)}, got {name!r}")
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype in which every op sums and returns.

    Parameters
    ----------
    dtype : torch.dtype
        That of the op's inputs.

    Returns
    -------
    torch.dtype
        float64 for float64, otherwise float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def define(op: str, schema: str, shapes: Callable[..., Sequence[Sequence[int]]]) -> None:
    """Define ``growkern::op``: what it takes, what it returns, and that it runs the backend in force.

    Parameters
    ----------
    op : str
        Name of the op without its namespace.
    schema : str
        Its arguments, the first of them a tensor, and its results, which are contiguous.
    shapes : Callable
        Checks the arguments and gives the shapes of the results. It is called before every run, so that a
        compiled graph and a direct call of torch.ops are checked as well.
    """
    torch.library.define(f"growkern::{op}", schema)

    @torch.library.impl(f"growkern::{op}", "CompositeExplicitAutograd")
    def run(*args: Any) -> tuple[Tensor, ...]:
        shapes(*args)
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return implementation(op, device)(*args)
        with torch.autocast(device, enabled=False):
            return implementation(op, device)(*args)

    @torch.library.register_fake(f"growkern::{op}")
    def fake(*args: Any) -> tuple[Tensor, ...]:
        dtype = result_dtype(args[0].dtype)
        return tuple(args[0].new_empty(shape, dtype=dtype) for shape in shapes(*args))


def implementation(op: str, device: str) -> Callable[..., Any]:
    """Give the implementation of `op` that is in force.

    Parameters
    ----------
    op : str
        Name of the op without its namespace.
    device : str
        Type of the device of its tensors.

    Returns
    -------
    Callable
        Of the backend that was chosen, or for "auto" of the first that takes the device.

    Raises
    ------
    ValueError
        If ``GROWKERN_BACKEND`` names no backend.
    RuntimeError
        If the backend does not implement the op here, or does not take the device.
    """
    name = _chosen or os.environ.get("GROWKERN_BACKEND", "auto")
    if name not in ACCEPTED:
        raise ValueError(f"GROWKERN_BACKEND: expected one of {', '.join(ACCEPTED)}, got {name!r}")
    known = _implementations[op]
    if name == "auto":
        if device == "cpu" and "cpp" not in known:
            _mention_missing_kernels()
        fitting = (each for each in BACKENDS if each in known and device in DEVICES.get(each, (device,)))
        name = next(each for each in fitting if _is_here(each))
    elif name not in known or not _is_here(name):
        raise RuntimeError(f"{op} has no {name} implementation here; available: {', '.join(available(op))}")
    elif device not in DEVICES.get(name, (device,)):
        raise RuntimeError(f"{op}: {name} takes {' or '.join(DEVICES[name])} tensors, got one on {device}")
    return known[name]


def _is_here(backend: str) -> bool:
    """Whether a backend that is registered can run; asked only where it matters, as it may start CUDA."""
    if backend == "triton":
        return has_triton()
    return "cpu" in DEVICES.get(backend, ("cpu",)) or torch.cuda.is_available()


@functools.cache
def _mention_missing_kernels() -> None:
    """Say once what makes the ops faster."""
    logger.warning(
        "growkern was installed without its compiled kernels and is slower than it could be. "
        "Where torch is installed: pip install --no-build-isolation --force-reinstall --no-deps growkern"
    )
