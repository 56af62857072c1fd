"""Tensor functions with kernels behind them; they know nothing of modules."""

from growkern.ops.jacobi import eigh, svd
from growkern.ops.moments import (
    ConvGeometry,
    conv2d_moments,
    conv2d_residual,
    linear_moments,
    linear_residual,
)

__all__ = [
    "ConvGeometry",
    "conv2d_moments",
    "conv2d_residual",
    "eigh",
    "linear_moments",
    "linear_residual",
    "svd",
]
