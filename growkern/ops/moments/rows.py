"""How activations lie in memory for the kernels of a GPU: rows of channels."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from growkern.ops.moments import reference
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.schedule import refuse_capture

COPY_FIELDS = 12  # first program, source, target, pixels, channels, pitch, area, width, four strides of the source
SUBTRACT_FIELDS = 24  # first program, what `Engine.subtract` takes, with pitches in units of 16 bytes, and all sizes
PACK_PIXELS, PACK_CHANNELS = 64, 16  # tile of a program that packs
ONES = 8  # elements of the row of ones: 16 bytes or more


class Rows(NamedTuple):
    """Activations as rows of channels, one for every pixel of every image.

    Attributes
    ----------
    data : Tensor
        (n, channels) or (images, height, width, channels), channels next to each other.
    channels : int
        Of a row, with those that only fill it up to whole 16 bytes.
    pitch : int
        Elements from one pixel to the next.
    """

    data: Tensor
    channels: int
    pitch: int


def alignment(*sides: Rows) -> int:
    """Count the elements of 16 bytes, if every row starts and ends at a multiple of them; otherwise 1."""
    elements = 16 // min(each.data.itemsize for each in sides)
    whole = all(
        each.channels % elements == 0 and each.pitch % elements == 0 and each.data.data_ptr() % 16 == 0
        for each in sides
    )
    return elements if whole else 1


def rows_of(tensor: Tensor) -> Rows:
    """Rows of channels as they lie, if they start and end at whole 16 bytes; otherwise copied once."""
    images = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
    pitch, copied = place(tensor)
    if not copied:
        return Rows(images, tensor.shape[1], pitch)
    rows = images.new_empty(*images.shape[:-1], pitch)
    rows[..., : tensor.shape[1]] = images
    rows[..., tensor.shape[1] :] = 0
    return Rows(rows, pitch, pitch)


def place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Give the pitch of a tensor's rows, and what to copy if they do not lie well: COPY_FIELDS from pixels on."""
    is_map, whole, channels = tensor.ndim == 4, 16 // tensor.itemsize, tensor.shape[1]
    pitch = channels if is_map else tensor.stride(0)
    in_place = tensor.is_contiguous(memory_format=torch.channels_last) if is_map else tensor.stride(1) == 1
    if in_place and channels % whole == 0 and pitch % whole == 0 and tensor.data_ptr() % 16 == 0:
        return pitch, ()
    pitch = channels + -channels % whole
    height, width = tensor.shape[2:] if is_map else (1, 1)
    steps = tensor.stride() if is_map else (*tensor.stride(), 0, 0)
    return pitch, (len(tensor) * height * width, channels, pitch, height * width, width, *steps)


def is_far(tensor: Tensor) -> bool:
    """Whether rows of channels lie further apart than 32 bits reach, once copied or as they are."""
    rows = tensor.numel() // max(1, tensor.shape[1])
    return rows * (max(tensor.shape[1], abs(tensor.stride(0)) if tensor.ndim == 2 else 0) + 16) >= 2**31 - 2**16


def sources(x: Rows, h: Rows, v: Rows) -> list[Rows]:
    """List the sources of products, with the ones last."""
    return [x, h, v, Rows(ones(x.data.dtype, x.data.device), ONES, ONES)]


@functools.cache
def ones(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a row of a one, then zeros."""
    refuse_capture(device)
    return torch.eye(1, ONES, dtype=dtype, device="cpu")[0].to(device)


def read_by(consumer: ConvGeometry, h: Tensor, v: Tensor) -> Tensor:
    """Give h as its one patch in each image where the consumer has one output, so that its taps are channels."""
    if tuple(v.shape[2:]) != (1, 1) or consumer.taps == 1:
        return h
    return reference.patches_of(h, consumer, v.shape[2:], False, h.dtype).transpose(0, 1)
