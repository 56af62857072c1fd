"""Second moments by the kernels of csrc/moments, on CUDA tensors."""

import functools

from growkern.backend import register
from growkern.ops.moments import _cuda, gpu

for _op in (gpu.linear_moments, gpu.linear_residual, gpu.conv2d_moments, gpu.conv2d_residual, gpu.grouped_moments):
    register(_op.__name__, "cuda")(functools.partial(_op, _cuda))
