"""Second moments by the Triton kernels, which are imported when the first one is needed."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from growkern.backend import register
from growkern.ops.moments import gpu


def _with_engine(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*args: Any) -> tuple[Tensor, ...]:
        from growkern.ops.moments import _triton

        return op(_triton, *args)

    return run


for _op in (gpu.linear_moments, gpu.linear_residual, gpu.conv2d_moments, gpu.conv2d_residual):
    register(_op.__name__, "triton")(_with_engine(_op))
