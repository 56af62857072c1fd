"""Second moments of a producer's input x, its consumer's input h and the desired change v.

They are the sums over samples from which every growth method is solved (Verbockhaven et al., *Growing Tiny
Networks*, TMLR 2024, propositions 3.1 and 3.2). Sums, not means, so that batches and workers add: in float32
for float32, bfloat16 and float16 inputs, in float64 for float64, also under autocast. They carry no gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from growkern.backend import define, implementation, register
from growkern.ops import native
from growkern.ops.moments import group, reference, triton  # noqa: F401  (the reference registers itself)
from growkern.ops.moments.calls import Call, Residual, packed
from growkern.ops.moments.checks import (
    conv2d_moments_shapes,
    conv2d_residual_shapes,
    linear_moments_shapes,
    linear_residual_shapes,
)
from growkern.ops.moments.geometry import ConvGeometry

if native.load("cpu"):
    from growkern.ops.moments import cpp
if native.load("cuda"):
    from growkern.ops.moments import cuda

    group.serve(cuda, "cuda")
group.serve(triton, "triton")

__all__ = [
    "Call",
    "ConvGeometry",
    "Residual",
    "conv2d_moments",
    "conv2d_residual",
    "grouped_moments",
    "grouped_residuals",
    "linear_moments",
    "linear_residual",
]

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def linear_moments(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    *,
    x_bias: bool = False,
    h_bias: bool = False,
    precision: str = "ieee",
) -> Six:
    """Sum the joint second moments of x, h and v over the rows.

    Parameters
    ----------
    x : Tensor, shape (n, p) or (n, p − 1) with `x_bias`
        Input of the producer.
    h : Tensor, shape (n, q) or (n, q − 1) with `h_bias`
        Input of the consumer, in the dtype and on the device of `x`.
    v : Tensor, shape (n, r)
        Desired change of the consumer's output, likewise.
    x_bias, h_bias : bool
        Append a last column of ones to x, to h.
    precision : {"ieee", "tf32"}
        Of float32 matrix products; "tf32" allows tf32 where the device has it.

    Returns
    -------
    xx, xh, xv, hh, hv, vv : Tensor, shapes (p, p), (p, q), (p, r), (q, q), (q, r), (r, r)
        Σ x xᵀ, Σ x hᵀ and so on, in the squared units of the inputs; zeros where n = 0.

    Raises
    ------
    TypeError
        If dtypes differ or are not floating point.
    ValueError
        If shapes or devices do not fit together, or `precision` is unknown.
    """
    return torch.ops.growkern.linear_moments(x.detach(), h.detach(), v.detach(), x_bias, h_bias, precision)


def linear_residual(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    *,
    signs: Tensor | None = None,
    rows_per_sign: int = 1,
    x_bias: bool = False,
    h_bias: bool = False,
    precision: str = "ieee",
) -> Three:
    """Sum x v⊥ᵀ over the rows, as it is and under each draw of signs, where v⊥ = v − update·h.

    With `update` = dW*, the best change of the consumer's weights, v⊥ is what no change of them can reach.

    Parameters
    ----------
    x, h, v, x_bias, h_bias, precision
        As in `linear_moments`.
    update : Tensor, shape (r, q)
        Change of the consumer's weights, its bias last with `h_bias`; float32 or float64.
    signs : Tensor, shape (R, ⌈n / rows_per_sign⌉), optional
        Draws of ±1, one per run of rows, in any floating-point dtype. None means R = 0.
    rows_per_sign : int
        Consecutive rows that share a sign; the last run may be shorter.

    Returns
    -------
    xr : Tensor, shape (p, r)
        Σ x v⊥ᵀ.
    xr_null : Tensor, shape (R, p, r)
        Σ s x v⊥ᵀ for each draw s.
    hr_null : Tensor, shape (R, q, r)
        Σ s h v⊥ᵀ for each draw s.

    Raises
    ------
    TypeError
        If dtypes differ or are not accepted.
    ValueError
        If shapes or devices do not fit together, `precision` is unknown, or `rows_per_sign` is less than 1.
    """
    return torch.ops.growkern.linear_residual(
        x.detach(), h.detach(), v.detach(), update.detach(), signs, rows_per_sign, x_bias, h_bias, precision
    )


def conv2d_moments(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    *,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    kernel: str = "full",
    x_bias: bool = False,
    h_bias: bool = False,
    precision: str = "ieee",
) -> Six:
    """Sum the joint second moments of two convolutions' patches and v over images and positions.

    Samples of h and v are (image, consumer output position l); h_l is the patch that the consumer reads
    there. Patch features run as in ``weight.flatten(1)``: channel, row, column, then the one of the bias.

    With ``kernel="center"``, x_l is the producer's patch at the hidden position that the centre tap k//2 of
    the consumer reads at l; it is all zero, its one included, where that lies outside the hidden map. With
    ``kernel="full"``, xx sums x_i x_iᵀ over the hidden positions i, each as often as the consumer reads it,
    and xv has, for each tap of the consumer, Σ x_i v_lᵀ over the pairs (i, l) that the tap joins. All taps
    share the one xx, which is TINY's approximation; xh is not needed then and has no columns.

    Parameters
    ----------
    x : Tensor, shape (B, C, H, W)
        Input map of the producer, in any memory format.
    h : Tensor, shape (B, Ch, Hh, Wh)
        Input map of the consumer, of the size that `producer` makes of x; dtype and device as x.
    v : Tensor, shape (B, r, Ho, Wo)
        Desired change of the consumer's output map, of the size that `consumer` makes of h; likewise.
    producer, consumer : ConvGeometry
        Where the two kernels read.
    kernel : {"full", "center"}
        Whether a new fan-out is the consumer's whole kernel or 1×1 at its centre.
    x_bias, h_bias : bool
        Append a one to each patch of x, of h.
    precision : {"ieee", "tf32"}
        Of float32 matrix products; "tf32" allows tf32 where the device has it.

    Returns
    -------
    xx : Tensor, shape (p, p)
        p = C·kh·kw of the producer, plus 1 with `x_bias`.
    xh : Tensor, shape (p, q) or (p, 0) for "full"
        q = Ch·kh·kw of the consumer, plus 1 with `h_bias`.
    xv : Tensor, shape (p, r) or (p, r·kh·kw) for "full"
        Columns run as (r, row, column) of the consumer's kernel.
    hh, hv, vv : Tensor, shapes (q, q), (q, r), (r, r)
        In the squared units of the inputs; zeros where B = 0.

    Raises
    ------
    TypeError
        If dtypes differ or are not floating point, or a geometry is not a `ConvGeometry`.
    ValueError
        If shapes or devices do not fit together, or `kernel` or `precision` is unknown.
    """
    made, read = packed("producer", producer), packed("consumer", consumer)
    return torch.ops.growkern.conv2d_moments(
        x.detach(), h.detach(), v.detach(), made, read, kernel, x_bias, h_bias, precision
    )


def conv2d_residual(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    *,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    kernel: str = "full",
    signs: Tensor | None = None,
    x_bias: bool = False,
    h_bias: bool = False,
    precision: str = "ieee",
) -> Three:
    """Sum x v⊥ᵀ over images and positions, as it is and under each draw of signs, where v⊥ = v − update·h.

    Parameters
    ----------
    x, h, v, producer, consumer, kernel, x_bias, h_bias, precision
        As in `conv2d_moments`.
    update : Tensor, shape (r, q)
        Change of the consumer's ``weight.flatten(1)``, its bias last with `h_bias`; float32 or float64.
    signs : Tensor, shape (R, B), optional
        Draws of ±1, one per image, in any floating-point dtype. None means R = 0.

    Returns
    -------
    xr : Tensor, shape (p, r) or (p, r·kh·kw) for "full"
        As xv of `conv2d_moments`, with v⊥ for v.
    xr_null : Tensor, shape (R, p, r) or (R, p, r·kh·kw)
        The same under each draw.
    hr_null : Tensor, shape (R, q, r) or (R, 0, r) for "full"
        Σ s h v⊥ᵀ for each draw s.

    Raises
    ------
    TypeError
        If dtypes differ or are not accepted, or a geometry is not a `ConvGeometry`.
    ValueError
        If shapes or devices do not fit together, or `kernel` or `precision` is unknown.
    """
    made, read = packed("producer", producer), packed("consumer", consumer)
    return torch.ops.growkern.conv2d_residual(
        x.detach(),
        h.detach(),
        v.detach(),
        update.detach(),
        made,
        read,
        kernel,
        signs,
        x_bias,
        h_bias,
        precision,
    )


def grouped_moments(calls: Sequence[Call]) -> list[Six]:
    """Sum the moments of several sites, on a GPU in a handful of launches: small sites cost little but those.

    Parameters
    ----------
    calls : sequence of Call
        The arguments of one `linear_moments` or `conv2d_moments` each.

    Returns
    -------
    list of six Tensors
        What each call gives.

    Raises
    ------
    TypeError
        As the two ops do.
    ValueError
        As the two ops do, or if the calls are on several kinds of devices.
    """
    return _grouped("grouped_moments", calls)


def grouped_residuals(calls: Sequence[Residual]) -> list[Three]:
    """Sum the products with v⊥ of several sites, on a GPU in a handful of launches.

    Parameters
    ----------
    calls : sequence of Residual
        The arguments of one `linear_residual` or `conv2d_residual` each.

    Returns
    -------
    list of three Tensors
        What each call gives.

    Raises
    ------
    TypeError
        As the two ops do.
    ValueError
        As the two ops do, if `rows_per_sign` is not 1 for maps, or if the calls are on several kinds of devices.
    """
    for call in calls:
        if call.call.producer is not None and call.rows_per_sign != 1:
            raise ValueError(f"rows_per_sign: expected 1 for convolutions, got {call.rows_per_sign}")
    return _grouped("grouped_residuals", calls)


def _grouped(op: str, calls: Sequence[Any]) -> list[Any]:
    """Run a group with the backend in force, which checks the arguments of every call."""
    if not calls:
        return []
    kinds = {call.x.device.type for call in calls}
    if len(kinds) > 1:
        raise ValueError(f"calls: expected all tensors on one kind of device, got {' and '.join(sorted(kinds))}")
    (device,) = kinds
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return implementation(op, device)(calls)


def _moments(call: Call) -> Six:
    x, h, v, made, read, kernel, x_bias, h_bias, precision = call
    if made is None or read is None:
        return linear_moments(x, h, v, x_bias=x_bias, h_bias=h_bias, precision=precision)
    geometry: dict[str, Any] = {"producer": made, "consumer": read, "kernel": kernel}
    return conv2d_moments(x, h, v, **geometry, x_bias=x_bias, h_bias=h_bias, precision=precision)


def _residual(call: Residual) -> Three:
    x, h, v, made, read, kernel, x_bias, h_bias, precision = call.call
    named: dict[str, Any] = {"signs": call.signs, "x_bias": x_bias, "h_bias": h_bias, "precision": precision}
    if made is None or read is None:
        return linear_residual(x, h, v, call.update, rows_per_sign=call.rows_per_sign, **named)
    return conv2d_residual(x, h, v, call.update, producer=made, consumer=read, kernel=kernel, **named)


def _with_uniform(calls: Sequence[Call]) -> list[Six]:
    """Sum the moments of every site, together with those of its x and ones alone where they come next."""
    found: list[Six] = []
    for number, call in enumerate(calls):
        if len(found) > number:
            continue
        following = calls[number + 1] if number + 1 < len(calls) else None
        if following is None or not following.is_uniform_of(call):
            found.append(_moments(call))
            continue
        following.check()
        six, uniform = cpp.moments_and_uniform(call)
        none = uniform[:, :0]
        found += [six, (uniform, none, none, none[:0], none[:0], none[:0])]
    return found


register("grouped_moments", "reference")(lambda calls: list(map(_moments, calls)))
register("grouped_residuals", "reference")(lambda calls: list(map(_residual, calls)))
if native.load("cpu"):
    register("grouped_moments", "cpp")(_with_uniform)
    register("grouped_residuals", "cpp")(lambda calls: list(map(_residual, calls)))


define(
    "linear_moments",
    "(Tensor x, Tensor h, Tensor v, bool x_bias, bool h_bias, str precision)"
    " -> (Tensor xx, Tensor xh, Tensor xv, Tensor hh, Tensor hv, Tensor vv)",
    linear_moments_shapes,
)
define(
    "linear_residual",
    "(Tensor x, Tensor h, Tensor v, Tensor update, Tensor? signs, int rows_per_sign, bool x_bias, bool h_bias,"
    " str precision) -> (Tensor xr, Tensor xr_null, Tensor hr_null)",
    linear_residual_shapes,
)
define(
    "conv2d_moments",
    "(Tensor x, Tensor h, Tensor v, int[] producer, int[] consumer, str kernel, bool x_bias, bool h_bias,"
    " str precision) -> (Tensor xx, Tensor xh, Tensor xv, Tensor hh, Tensor hv, Tensor vv)",
    conv2d_moments_shapes,
)
define(
    "conv2d_residual",
    "(Tensor x, Tensor h, Tensor v, Tensor update, int[] producer, int[] consumer, str kernel, Tensor? signs,"
    " bool x_bias, bool h_bias, str precision) -> (Tensor xr, Tensor xr_null, Tensor hr_null)",
    conv2d_residual_shapes,
)
