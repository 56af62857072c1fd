"""What the ops accept, and the shapes of what they return."""

import torch
from torch import Tensor

from growkern.ops.moments.geometry import ConvGeometry

KERNELS = ("full", "center")
PRECISIONS = ("ieee", "tf32")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Shapes = list[tuple[int, ...]]


def linear_moments_shapes(x: Tensor, h: Tensor, v: Tensor, x_bias: bool, h_bias: bool, precision: str) -> Shapes:
    """Check the arguments of `linear_moments` and give the shapes of its results."""
    _check_choice("precision", precision, PRECISIONS)
    _check_tensors(x, h, v, "features")
    p, q, r = x.shape[1] + int(x_bias), h.shape[1] + int(h_bias), v.shape[1]  # shapes may be symbols
    return [(p, p), (p, q), (p, r), (q, q), (q, r), (r, r)]


def linear_residual_shapes(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    signs: Tensor | None,
    rows_per_sign: int,
    x_bias: bool,
    h_bias: bool,
    precision: str,
) -> Shapes:
    """Check the arguments of `linear_residual` and give the shapes of its results."""
    _, _, xv, _, hv, _ = linear_moments_shapes(x, h, v, x_bias, h_bias, precision)
    if rows_per_sign < 1:
        raise ValueError(f"rows_per_sign: expected an integer of at least 1, got {rows_per_sign}")
    draws = _check_residual(-(-x.shape[0] // rows_per_sign), x, update, signs, *hv)
    return [xv, (draws, *xv), (draws, *hv)]


def conv2d_moments_shapes(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    producer: list[int],
    consumer: list[int],
    kernel: str,
    x_bias: bool,
    h_bias: bool,
    precision: str,
) -> Shapes:
    """Check the arguments of `conv2d_moments` and give the shapes of its results."""
    _check_choice("kernel", kernel, KERNELS)
    _check_choice("precision", precision, PRECISIONS)
    _check_tensors(x, h, v, "C, H, W")
    made, read = ConvGeometry.unpack(producer), ConvGeometry.unpack(consumer)
    _check_map("h", h, "producer", made, x)
    _check_map("v", v, "consumer", read, h)
    p, q, r = x.shape[1] * made.taps + int(x_bias), h.shape[1] * read.taps + int(h_bias), v.shape[1]
    xh, xv = ((p, 0), (p, r * read.taps)) if kernel == "full" else ((p, q), (p, r))
    return [(p, p), xh, xv, (q, q), (q, r), (r, r)]


def conv2d_residual_shapes(
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
) -> Shapes:
    """Check the arguments of `conv2d_residual` and give the shapes of its results."""
    _, xh, xv, _, (q, r), _ = conv2d_moments_shapes(x, h, v, producer, consumer, kernel, x_bias, h_bias, precision)
    draws = _check_residual(x.shape[0], x, update, signs, q, r)
    return [xv, (draws, *xv), (draws, xh[1], r)]


def _check_choice(name: str, given: str, accepted: tuple[str, ...]) -> None:
    if given not in accepted:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, accepted))}, got {given!r}")


def _check_tensors(x: Tensor, h: Tensor, v: Tensor, features: str) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    samples: int | str = "n"
    for name, tensor in (("x", x), ("h", h), ("v", v)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {tensor.dtype}")
        _check_device(name, tensor, x)
        if tensor.ndim != 2 + features.count(",") or tensor.shape[0] != x.shape[0]:
            raise ValueError(f"{name}: expected a ({samples}, {features}) tensor, got {_shape(tensor)}")
        samples = x.shape[0]


def _check_map(name: str, given: Tensor, conv: str, geometry: ConvGeometry, source: Tensor) -> None:
    for axis, side in enumerate(("rows", "columns")):
        length, given_length = source.shape[2 + axis], given.shape[2 + axis]
        lengths = [geometry.output_length(axis, length, extra) for extra in (0, 1)]
        if given_length < 1 or given_length not in lengths:
            accepted = " or ".join(str(n) for n in sorted(set(lengths)) if n > 0) or "none: too few"
            raise ValueError(
                f"{name}: expected as many {side} as {conv} makes of {length} ({accepted}), got {_shape(given)}"
            )


def _check_residual(count: int, x: Tensor, update: Tensor, signs: Tensor | None, q: int, r: int) -> int:
    if update.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"update: expected float32 or float64, got {update.dtype}")
    _check_device("update", update, x)
    if update.shape != (r, q):
        raise ValueError(f"update: expected a ({r}, {q}) tensor, got {_shape(update)}")
    if signs is None:
        return 0
    if not signs.is_floating_point():
        raise TypeError(f"signs: expected a floating-point dtype, got {signs.dtype}")
    _check_device("signs", signs, x)
    if signs.ndim != 2 or signs.shape[1] != count:
        raise ValueError(f"signs: expected a (draws, {count}) tensor, got {_shape(signs)}")
    return signs.shape[0]


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like x, got one on {tensor.device}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
