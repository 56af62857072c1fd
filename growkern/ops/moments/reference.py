"""Second moments in plain PyTorch: the definition, in any dtype including float64.

Every sum runs over chunks of samples in a fixed order: temporaries stay near `CHUNK_BYTES` whatever the size
of the batch, and results are the same from run to run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from growkern.backend import register, result_dtype
from growkern.ops.moments.geometry import ConvGeometry

CHUNK_BYTES = 64 * 2**20

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


@register("linear_moments", "reference")
def linear_moments(x: Tensor, h: Tensor, v: Tensor, x_bias: bool, h_bias: bool, precision: str) -> Six:
    """Sum x xᵀ, x hᵀ, x vᵀ, h hᵀ, h vᵀ and v vᵀ over the rows."""
    dtype = result_dtype(x.dtype)
    p, q, r = x.shape[1] + x_bias, h.shape[1] + h_bias, v.shape[1]
    xx, xh, xv, hh, hv, vv = _zeros(x, (p, p), (p, q), (p, r), (q, q), (q, r), (r, r))
    with matmul_precision(x.device, precision):
        for rows in _chunks(len(x), (p + q + r) * dtype.itemsize):
            xs, hs = _with_ones(x[rows].to(dtype), x_bias), _with_ones(h[rows].to(dtype), h_bias)
            vs = v[rows].to(dtype)
            xx.addmm_(xs.T, xs)
            xh.addmm_(xs.T, hs)
            xv.addmm_(xs.T, vs)
            hh.addmm_(hs.T, hs)
            hv.addmm_(hs.T, vs)
            vv.addmm_(vs.T, vs)
    return xx, xh, xv, hh, hv, vv


@register("linear_residual", "reference")
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
    """Sum x v⊥ᵀ over the rows, and x v⊥ᵀ and h v⊥ᵀ under every draw of one sign per run of rows."""
    dtype = result_dtype(x.dtype)
    p, q, r = x.shape[1] + x_bias, h.shape[1] + h_bias, v.shape[1]
    update, draws = update.to(dtype), _draws(signs, x).repeat_interleave(rows_per_sign, 1)[:, : len(x)]
    count = len(draws)
    xr, xr_null, hr_null = _zeros(x, (p, r), (p, count * r), (q, count * r))
    with matmul_precision(x.device, precision):
        for rows in _chunks(len(x), (p + q + (count + 1) * r) * dtype.itemsize):
            xs, hs = _with_ones(x[rows].to(dtype), x_bias), _with_ones(h[rows].to(dtype), h_bias)
            residual = v[rows].to(dtype) - hs @ update.T  # (rows, r)
            signed = (draws[:, rows].T[:, :, None] * residual[:, None]).flatten(1)  # (rows, draws·r)
            xr.addmm_(xs.T, residual)
            xr_null.addmm_(xs.T, signed)
            hr_null.addmm_(hs.T, signed)
    nulls = xr_null.view(p, count, r), hr_null.view(q, count, r)
    xr_null, hr_null = (null.transpose(0, 1).contiguous() for null in nulls)
    return xr, xr_null, hr_null


@register("conv2d_moments", "reference")
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
    """Sum the six moments over images and positions; "full" counts a hidden position once per reading."""
    made, read = ConvGeometry.unpack(producer), ConvGeometry.unpack(consumer)
    dtype, full = result_dtype(x.dtype), kernel == "full"
    hidden, outputs = h.shape[2:], v.shape[2:]
    p, q, r = x.shape[1] * made.taps + x_bias, h.shape[1] * read.taps + h_bias, v.shape[1]
    targets, positions = (r * read.taps, hidden.numel()) if full else (r, outputs.numel())
    xx, xh, xv, hh, hv, vv = _zeros(x, (p, p), (p, 0 if full else q), (p, targets), (q, q), (q, r), (r, r))
    reads = _at_hidden(v.new_ones(1, 1, *outputs, dtype=dtype), read, hidden).sum(0)  # (1, Hh, Wh)
    image = (2 * p + targets) * positions + (q + r) * outputs.numel()
    with matmul_precision(x.device, precision):
        for images in _chunks(len(x), image * dtype.itemsize):
            xs = _producer_patches(x[images], made, read, hidden, outputs, full, x_bias, dtype)
            hs = patches_of(h[images], read, outputs, h_bias, dtype).flatten(1)  # (q, images·Ho·Wo)
            vs = v[images].transpose(0, 1).to(dtype)  # (r, images, Ho, Wo)
            if full:
                xx.addmm_((xs * reads).flatten(1), xs.flatten(1).T)
                xv.addmm_(xs.flatten(1), _at_hidden(vs, read, hidden).flatten(1).T)
            else:
                xx.addmm_(xs.flatten(1), xs.flatten(1).T)
                xh.addmm_(xs.flatten(1), hs.T)
                xv.addmm_(xs.flatten(1), vs.flatten(1).T)
            hh.addmm_(hs, hs.T)
            hv.addmm_(hs, vs.flatten(1).T)
            vv.addmm_(vs.flatten(1), vs.flatten(1).T)
    return xx, xh, xv, hh, hv, vv


@register("conv2d_residual", "reference")
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
    """Sum x v⊥ᵀ over images and positions, and x v⊥ᵀ and h v⊥ᵀ under every draw of one sign per image."""
    made, read = ConvGeometry.unpack(producer), ConvGeometry.unpack(consumer)
    dtype, full = result_dtype(x.dtype), kernel == "full"
    hidden, outputs = h.shape[2:], v.shape[2:]
    p, q, r = x.shape[1] * made.taps + x_bias, h.shape[1] * read.taps + h_bias, v.shape[1]
    targets, positions = (r * read.taps, hidden.numel()) if full else (r, outputs.numel())
    update, draws = update.to(dtype), _draws(signs, x)
    count, q_null = len(draws), 0 if full else q
    xr, xr_null, hr_null = _zeros(x, (p, targets), (count, p, targets), (count, q_null, r))
    image = (p + targets) * positions + (q + 2 * r) * outputs.numel() + p * targets + q_null * r
    with matmul_precision(x.device, precision):
        for images in _chunks(len(x), image * dtype.itemsize):
            xs = _producer_patches(x[images], made, read, hidden, outputs, full, x_bias, dtype)
            hs = patches_of(h[images], read, outputs, h_bias, dtype)  # (q, images, Ho, Wo)
            vs = v[images].transpose(0, 1).to(dtype)  # (r, images, Ho, Wo)
            residual = vs - torch.tensordot(update, hs, 1)
            if full:
                residual = _at_hidden(residual, read, hidden)  # (r·kh·kw, images, Hh, Wh)
            else:
                hr_null.flatten(1).addmm_(draws[:, images], _per_image(hs, residual).flatten(1))
            per_image = _per_image(xs, residual)  # (images, p, targets)
            xr += per_image.sum(0)
            xr_null.flatten(1).addmm_(draws[:, images], per_image.flatten(1))
    return xr, xr_null, hr_null


def _producer_patches(
    x: Tensor,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    hidden: torch.Size,
    outputs: torch.Size,
    full: bool,
    bias: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Patches at the hidden positions, or for each consumer position at the one that its centre tap reads."""
    if full:
        return patches_of(x, producer, hidden, bias, dtype)
    rows = _reading(consumer, 0, consumer.kernel_size[0] // 2, hidden, outputs)
    columns = _reading(consumer, 1, consumer.kernel_size[1] // 2, hidden, outputs)
    windows = _windows(x, producer, hidden)[..., rows[1], columns[1]]
    patches = x.new_zeros(windows.shape[:3].numel() + bias, len(x), *outputs, dtype=dtype)
    _fill(patches[..., rows[0], columns[0]], windows)
    return patches


def patches_of(maps: Tensor, geometry: ConvGeometry, size: torch.Size, bias: bool, dtype: torch.dtype) -> Tensor:
    """Patches at every output position: (features, images, *size)."""
    windows = _windows(maps, geometry, size)
    patches = maps.new_empty(windows.shape[:3].numel() + bias, len(maps), *size, dtype=dtype)
    _fill(patches, windows)
    return patches


def _windows(maps: Tensor, geometry: ConvGeometry, size: torch.Size) -> Tensor:
    """View the zero-padded maps as patches: (channels, kh, kw, images, *size)."""
    pads: list[int] = []
    for axis in (1, 0):
        before = geometry.padding[axis]
        last = (size[axis] - 1) * geometry.stride[axis] + geometry.span(axis)
        pads += [before, max(0, last - before - maps.shape[2 + axis])]
    windows = F.pad(maps, pads)
    for axis in (0, 1):
        windows = windows.unfold(2 + axis, geometry.span(axis), geometry.stride[axis])
        windows = windows[..., :: geometry.dilation[axis]]
    return windows.permute(1, 4, 5, 0, 2, 3)


def _fill(patches: Tensor, windows: Tensor) -> None:
    """Write the windows, and ones into the row below them where there is one."""
    features = windows.shape[:3].numel()
    patches[:features].unflatten(0, windows.shape[:3]).copy_(windows)
    patches[features:] = 1


def _at_hidden(values: Tensor, consumer: ConvGeometry, hidden: torch.Size) -> Tensor:
    """Move (r, images, Ho, Wo) values, for each tap, to where it reads: (r·kh·kw, images, Hh, Wh)."""
    kh, kw = consumer.kernel_size
    outputs = values.shape[2:]
    moved = values.new_zeros(len(values), kh, kw, values.shape[1], *hidden)
    for ky in range(kh):
        rows, read_rows = _reading(consumer, 0, ky, hidden, outputs)
        for kx in range(kw):
            columns, read_columns = _reading(consumer, 1, kx, hidden, outputs)
            moved[:, ky, kx, :, read_rows, read_columns] = values[:, :, rows, columns]
    return moved.flatten(0, 2)


def _reading(
    geometry: ConvGeometry, axis: int, tap: int, inputs: torch.Size, outputs: torch.Size
) -> tuple[slice, slice]:
    """Output positions at which a tap reads inside the map, and the input positions that it reads there."""
    stride = geometry.stride[axis]
    offset = geometry.dilation[axis] * tap - geometry.padding[axis]
    first = max(0, -(offset // stride))
    last = max(first, min(outputs[axis], (inputs[axis] - 1 - offset) // stride + 1))
    return slice(first, last), slice(stride * first + offset, stride * last + offset, stride)


def _per_image(left: Tensor, right: Tensor) -> Tensor:
    """Sum left rightᵀ over the positions of each image: (images, features of left, features of right)."""
    return torch.bmm(left.flatten(2).transpose(0, 1), right.flatten(2).permute(1, 2, 0))


def _with_ones(rows: Tensor, bias: bool) -> Tensor:
    return F.pad(rows, (0, 1), value=1.0) if bias else rows


def _draws(signs: Tensor | None, x: Tensor) -> Tensor:
    dtype = result_dtype(x.dtype)
    return x.new_empty(0, len(x), dtype=dtype) if signs is None else signs.to(dtype)


def _zeros(x: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [x.new_zeros(shape, dtype=result_dtype(x.dtype)) for shape in shapes]


def _chunks(samples: int, sample_bytes: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // max(1, sample_bytes))
    return (slice(start, start + step) for start in range(0, samples, step))


@contextmanager
def matmul_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Hold float32 matrix products to `precision`, whatever the process allows; only CUDA knows tf32 here."""
    cuda = device.type == "cuda"
    settings = torch.backends.cuda.matmul if cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = precision if cuda else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
