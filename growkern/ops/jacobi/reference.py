"""Eigenproblems and singular value decompositions by torch.linalg: the definition."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from growkern.backend import register


@register("eigh", "reference")
def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; NaN where a matrix has none to find."""
    w, q = _isolated(torch.linalg.eigh, a)
    return w, q


@register("svd", "reference")
def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced singular value decomposition; NaN where a matrix has none to find."""
    u, s, vh = _isolated(lambda matrices: torch.linalg.svd(matrices, full_matrices=False), a)
    return u, s, vh


def all_finite(a: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    return not a.numel() or bool(a.amin().isfinite() & a.amax().isfinite())  # NaN is passed on


def _isolated(decompose: Callable[[Tensor], tuple[Tensor, ...]], a: Tensor) -> list[Tensor]:
    """Decompose the matrices so that one that cannot be leaves the others alone; row-major parts."""
    if a.device.type == "cpu" and all_finite(a):  # on a GPU, to look would be to wait
        with suppress(torch.linalg.LinAlgError):
            return [part.contiguous() for part in decompose(a)]
    finite = torch.isfinite(a).all(-1).all(-1)[..., None, None]  # (..., 1, 1)
    try:
        parts = decompose(torch.where(finite, a, 0.0))
    except torch.linalg.LinAlgError:
        if a.ndim == 2:
            nothing = a.new_full(a.shape, torch.nan)
            return _isolated(decompose, nothing)
        singles = [_isolated(decompose, matrix) for matrix in a]
        return [torch.stack(part) for part in zip(*singles, strict=True)]
    masks = (finite if part.ndim == a.ndim else finite.squeeze(-1) for part in parts)
    return [torch.where(mask, part, torch.nan).contiguous() for mask, part in zip(masks, parts, strict=True)]
