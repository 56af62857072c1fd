"""Second moments by the kernels of csrc/moments, on CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from growkern.backend import register, result_dtype
from growkern.ops.moments.calls import Call
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.reference import matmul_precision

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]

native = torch.ops.growkern_cpu

ROUNDING = 16  # units of rounding of all that a channel's maps hold, from which on a tap has read something
LONG, SHORT = 4096, 256  # rows of a run that is divided, and of its parts at least


@register("linear_moments", "cpp")
def linear_moments(x: Tensor, h: Tensor, v: Tensor, x_bias: bool, h_bias: bool, precision: str) -> Six:
    """Sum the joint second moment of x, h and v, each pair of columns once."""
    return native.linear_moments(x, h, v, x_bias, h_bias)


@register("conv2d_moments", "cpp")
def conv2d_moments(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    producer: list[int],
    consumer: list[int],
    kernel: str,
    x_bias: bool,
    h_bias: bool,
    precision: str,
) -> Six:
    """Sum the six moments as correlations at strides 1 and 2, and from patches gathered in cache otherwise."""
    sums = native.conv2d_moments(x, h, v, producer, consumer, kernel == "full", x_bias, h_bias, False)
    return _without_rounding(sums[:6], producer, consumer)


def moments_and_uniform(call: Call) -> tuple[Six, Tensor]:
    """Sum the moments of one convolution, and that of x and ones over all hidden positions from the same sums."""
    call.check()
    x, h, v = (each.detach() for each in call.tensors())
    producer, consumer = call.geometries() or ([], [])
    *six, uniform = native.conv2d_moments(x, h, v, producer, consumer, call.full, call.x_bias, call.h_bias, True)
    _clear(_unread(uniform, producer), (uniform, uniform.T))
    return _without_rounding(six, producer, consumer), uniform


def _without_rounding(six: Sequence[Tensor], producer: list[int], consumer: list[int]) -> Six:
    """Set to zero what belongs to taps that have read zeros only: borders taken from all of a map leave rounding."""
    xx, xh, xv, hh, hv, vv = six
    _clear(_unread(xx, producer), (xx, xx.T, xh, xv))
    _clear(_unread(hh, consumer), (hh, hh.T, xh.T, hv))
    return xx, xh, xv, hh, hv, vv


def _unread(moment: Tensor, geometry: list[int]) -> Tensor:
    """Tell which features have read nothing, by the largest of their channel."""
    taps = ConvGeometry.unpack(geometry).taps
    energy = moment.diagonal()[: len(moment) // taps * taps].view(-1, taps)
    least = ROUNDING * torch.finfo(moment.dtype).eps * energy.amax(1, keepdim=True)
    return (energy < least).flatten().nonzero().flatten()


def _clear(features: Tensor, moments: Sequence[Tensor]) -> None:
    for each in moments:
        if len(features) and each.numel():
            each[features] = 0


@register("linear_residual", "cpp")
def linear_residual(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    signs: Tensor | None,
    rows_per_sign: int,
    x_bias: bool,
    h_bias: bool,
    precision: str,
) -> Three:
    """Form v⊥ by one matrix product, then sum every run of rows once and add it up under all draws."""
    dtype = result_dtype(x.dtype)
    update = update.to(dtype)
    weight, bias = (update[:, :-1], update[:, -1]) if h_bias else (update, update.new_zeros(len(update)))
    with matmul_precision(x.device, precision):
        residual = torch.addmm(v.to(dtype) - bias, h.to(dtype), weight.T, alpha=-1)
    draws = _draws(signs, x)
    if rows_per_sign == 1 or not draws.numel():
        return native.linear_residual(x, h, residual, draws, x_bias, h_bias)
    # A long run is divided where it can be, for work that all threads share.
    pieces = next(
        (k for k in range(-(-rows_per_sign // LONG), rows_per_sign // SHORT + 1) if rows_per_sign % k == 0), 1
    )
    rows_per_sign, draws = rows_per_sign // pieces, draws.repeat_interleave(pieces, 1)
    draws = draws[:, : -(-len(x) // rows_per_sign)]
    # A run of rows is an image whose positions they are; what is left of them is one of its own.
    one, runs = ConvGeometry(1).pack(), len(x) // rows_per_sign
    parts = []
    for first, last, count in ((0, runs, rows_per_sign), (runs, draws.shape[1], len(x) - runs * rows_per_sign)):
        if first == last:
            continue
        rows = slice(first * rows_per_sign, first * rows_per_sign + (last - first) * count)
        maps = [each[rows].unflatten(0, (-1, count)).mT[:, :, None] for each in (x, h, residual)]
        some = draws[:, first:last].contiguous()
        parts.append(native.conv2d_residual(*maps, some, one, one, False, x_bias, h_bias))
    return parts[0] if len(parts) == 1 else tuple(a.add_(b) for a, b in zip(*parts, strict=True))


@register("conv2d_residual", "cpp")
def conv2d_residual(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    producer: list[int],
    consumer: list[int],
    kernel: str,
    signs: Tensor | None,
    x_bias: bool,
    h_bias: bool,
    precision: str,
) -> Three:
    """Form v⊥ by one convolution, then sum each image once and add it up under all draws."""
    residual = _convolution_residual(h, v, update, ConvGeometry.unpack(consumer), h_bias)
    return native.conv2d_residual(
        x, h, residual, _draws(signs, x), producer, consumer, kernel == "full", x_bias, h_bias
    )


def _convolution_residual(h: Tensor, v: Tensor, update: Tensor, consumer: ConvGeometry, bias: bool) -> Tensor:
    """Give v − update·h, in the dtype of the results."""
    dtype = result_dtype(h.dtype)
    update = update.to(dtype)
    features = h.shape[1] * consumer.taps
    shift = update[:, features:].flatten() if bias else None
    if not v.numel() or not features:
        return v.to(dtype) if shift is None else v.to(dtype) - shift[:, None, None]
    extra = [int(v.shape[2 + axis] > consumer.output_length(axis, h.shape[2 + axis])) for axis in (0, 1)]
    h = F.pad(h.to(dtype), (0, extra[1], 0, extra[0])) if any(extra) else h.to(dtype)
    weight = update[:, :features].unflatten(1, (-1, *consumer.kernel_size))
    settings = torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        read = F.conv2d(h, weight, shift, consumer.stride, consumer.padding, consumer.dilation)
    finally:
        settings.fp32_precision = before
    read = read[..., : v.shape[2], : v.shape[3]]
    return torch.sub(v, read, out=read)  # in its memory: most of the time of a new tensor goes to page faults


def _draws(signs: Tensor | None, x: Tensor) -> Tensor:
    dtype = result_dtype(x.dtype)
    return x.new_empty(0, len(x), dtype=dtype) if signs is None else signs.to(dtype).contiguous()
