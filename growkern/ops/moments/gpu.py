"""The second moments on a GPU: one way for Triton and for CUDA, which differ in the kernels of their engines."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from growkern.ops.moments import reference
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan, conv2d_plan, linear_plan, residual_plan
from growkern.ops.moments.schedule import Schedule, Tiles, schedule

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]

PER_IMAGE_BYTES = 256 * 2**20  # that the sums of single images may take at once
SPLITS_ELEMENTS = 4 * 2**20  # that partial sums may take whatever the size of inputs and results


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


class Engine(Protocol):
    """The kernels that a backend has to have. Nothing in them waits for the device."""

    def tiles(self, plan: Plan, dtype: torch.dtype, precision: str, device: torch.device) -> Tiles:
        """Choose how to cut the products of a plan."""

    def correlate(
        self, us: Sequence[Rows], vs: Sequence[Rows], out: Tensor, plan: Schedule, precision: str, signs: Tensor | None
    ) -> None:
        """Sum the products of a schedule into the workspace; us and vs are x, h, v and the ones."""

    def reduce(self, workspace: Tensor, plan: Schedule) -> None:
        """Add up the splits into their slots, in order."""

    def assemble(self, slots: Tensor, plan: Schedule, results: Sequence[Tensor]) -> None:
        """Write results from (draws, slots); each has as many draws."""

    def subtract(
        self, h: Rows, v: Rows, weight: Tensor, bias: Tensor, out: Rows, consumer: ConvGeometry, precision: str
    ) -> None:
        """Write v − (weight ∗ h + bias); weight is (taps, channels of h, channels of v)."""


def linear_moments(engine: Engine, x: Tensor, h: Tensor, v: Tensor, x_bias: bool, h_bias: bool, precision: str) -> Six:
    """Sum the joint second moment of x, h and v."""
    if _plain(x):
        return reference.linear_moments(x, h, v, x_bias, h_bias, precision)
    plan = linear_plan((x.shape[1], h.shape[1], v.shape[1]), x_bias, h_bias)
    xx, xh, xv, hh, hv, vv = _moments(engine, plan, (x, h, v), precision)
    return xx, xh, xv, hh, hv, vv


def conv2d_moments(
    engine: Engine,
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
    """Sum the six moments of patches from maps as they are."""
    if _plain(x):
        return reference.conv2d_moments(x, h, v, producer, consumer, kernel, x_bias, h_bias, precision)
    full, geometries = kernel == "full", (ConvGeometry.unpack(producer), ConvGeometry.unpack(consumer))
    plan = conv2d_plan(*_shapes(x, h, v), *geometries, full, x_bias, h_bias)
    results = _moments(engine, plan, (x, h, v), precision)
    if full:
        results.insert(1, results[0].new_empty(len(results[0]), 0))
    xx, xh, xv, hh, hv, vv = results
    return xx, xh, xv, hh, hv, vv


def linear_residual(
    engine: Engine,
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    signs: Tensor | None,
    x_bias: bool,
    h_bias: bool,
    precision: str,
) -> Three:
    """Sum x v⊥ᵀ, and x v⊥ᵀ and h v⊥ᵀ under every draw, whose signs are multiplied in as v⊥ is read."""
    if _plain(x):
        return reference.linear_residual(x, h, v, update, signs, x_bias, h_bias, precision)
    one = ConvGeometry(1)
    channels = (x.shape[1], h.shape[1], v.shape[1])
    plan = residual_plan(channels, ((1, 1),) * 3, one, one, False, x_bias, h_bias)
    with torch.cuda.device_of(x):
        us, left = _read(engine, x, h, v, update, one, h_bias, precision)
        draws = _draws(signs, x)
        table = _schedule(engine, plan, x, len(draws), False, precision)
        workspace = x.new_empty(table.elements, dtype=torch.float32)
        engine.correlate(us, _sides(left, left, left), workspace, table, precision, draws)
        engine.reduce(workspace, table)
        sums = workspace[: len(draws) * table.slots].view(len(draws), -1)
        return _residuals(engine, plan, table, sums)


def conv2d_residual(
    engine: Engine,
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
    """Sum x v⊥ᵀ over every image once, and add the images up as they are and under every draw."""
    if _plain(x):
        return reference.conv2d_residual(x, h, v, update, producer, consumer, kernel, signs, x_bias, h_bias, precision)
    full, made, read = kernel == "full", ConvGeometry.unpack(producer), ConvGeometry.unpack(consumer)
    plan = residual_plan(*_shapes(x, h, v), made, read, full, x_bias, h_bias)
    with torch.cuda.device_of(x), reference.matmul_precision(x.device, "ieee"):
        us, left = _read(engine, x, h, v, update, read, h_bias, precision)
        draws = _draws(signs, x)
        if len(draws) == 1:
            table = _schedule(engine, plan, x, 1, False, precision)
            workspace = x.new_empty(table.elements, dtype=torch.float32)
            engine.correlate(us, _sides(left, left, left), workspace, table, precision, None)
            engine.reduce(workspace, table)
            return _residuals(engine, plan, table, workspace[None, : table.slots])
        slots = sum(math.prod(plan.extent(number)) for number in range(len(plan.products)))
        step = max(1, PER_IMAGE_BYTES // (4 * max(1, slots)))
        sums = draws.new_zeros(len(draws), slots)
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            part = left._replace(data=left.data[some])
            table = _schedule(engine, plan, x[some], 1, True, precision)
            workspace = x.new_empty(table.elements, dtype=torch.float32)
            sides = [each._replace(data=each.data[some]) for each in us[:3]]
            engine.correlate(_sides(*sides), _sides(part, part, part), workspace, table, precision, None)
            sums.addmm_(draws[:, some], workspace.view(len(part.data), slots))
        return _residuals(engine, plan, table, sums)


def _plain(x: Tensor) -> bool:
    """float64 is for checks, and nothing needs no kernel."""
    return x.dtype == torch.float64 or len(x) == 0


def _shapes(
    x: Tensor, h: Tensor, v: Tensor
) -> tuple[tuple[int, int, int], tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    return (x.shape[1], h.shape[1], v.shape[1]), (_size(x), _size(h), _size(v))


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]


def _moments(engine: Engine, plan: Plan, tensors: Sequence[Tensor], precision: str) -> list[Tensor]:
    x = tensors[0]
    with torch.cuda.device_of(x):
        x_rows, h_rows, v_rows = (_rows(each) for each in tensors)
        sides = _sides(x_rows, h_rows, v_rows)
        table = _schedule(engine, plan, x, 1, False, precision)
        workspace = x.new_empty(table.elements, dtype=torch.float32)
        engine.correlate(sides, sides, workspace, table, precision, None)
        engine.reduce(workspace, table)
        results = [x.new_empty(shape, dtype=torch.float32) for shape in plan.shapes]
        engine.assemble(workspace[None, : table.slots], table, [result[None] for result in results])
        return results


def _residuals(engine: Engine, plan: Plan, table: Schedule, sums: Tensor) -> Three:
    """Assemble xr from the first draw, which is all ones, and the nulls from the others."""
    xr, *_ = firsts = [sums.new_empty(1, *shape) for shape in plan.shapes]
    xr_null, *hr_null = nulls = [sums.new_empty(len(sums) - 1, *shape) for shape in plan.shapes]
    engine.assemble(sums[:1], table, firsts)
    engine.assemble(sums[1:], table, nulls)
    targets = plan.channels[2]
    return xr.squeeze(0), xr_null, hr_null[0] if hr_null else sums.new_empty(len(sums) - 1, 0, targets)


def _schedule(engine: Engine, plan: Plan, x: Tensor, draws: int, per_image: bool, precision: str) -> Schedule:
    tiles = engine.tiles(plan, x.dtype, precision, x.device)
    images = len(x)
    outside = sum(images * c * h * w for c, (h, w) in zip(plan.channels, plan.sizes, strict=True))
    outside += draws * sum(height * width for height, width in plan.shapes)
    most = max(SPLITS_ELEMENTS, outside // 4)
    return schedule(plan, images, draws, per_image, tiles, _processors(x.device), most, x.device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def alignment(*sides: Rows) -> int:
    """Count the elements of 16 bytes, if every row starts and ends at a multiple of them; otherwise 1."""
    elements = 16 // min(each.data.itemsize for each in sides)
    whole = all(
        each.channels % elements == 0 and each.pitch % elements == 0 and each.data.data_ptr() % 16 == 0
        for each in sides
    )
    return elements if whole else 1


def _rows(tensor: Tensor) -> Rows:
    """Rows of channels: matrices as they lie, maps as they lie if channels_last, otherwise copied once."""
    if tensor.ndim == 2:
        matrix = tensor if tensor.stride(1) == 1 or tensor.shape[1] < 2 else tensor.contiguous()
        return Rows(matrix, matrix.shape[1], matrix.stride(0))
    images = tensor.permute(0, 2, 3, 1)
    channels, whole = tensor.shape[1], 16 // tensor.itemsize
    padding = -channels % whole
    if padding:
        images = F.pad(images, (0, padding))
    elif not images.is_contiguous() or images.data_ptr() % 16:
        images = images.clone(memory_format=torch.contiguous_format)
    return Rows(images, channels + padding, channels + padding)


def _sides(x: Rows, h: Rows, v: Rows) -> list[Rows]:
    """List the sources of products, with the ones last."""
    whole = 16 // x.data.itemsize
    return [x, h, v, Rows(_ones(x.data.dtype, x.data.device), whole, whole)]


@functools.cache
def _ones(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a row of 16 elements: a one, then zeros."""
    return torch.eye(1, 16, dtype=dtype)[0].to(device)


def _read(
    engine: Engine, x: Tensor, h: Tensor, v: Tensor, update: Tensor, consumer: ConvGeometry, bias: bool, precision: str
) -> tuple[list[Rows], Rows]:
    """Read the sides x and h of products, and form v⊥ = v − update·h in float32."""
    x_rows, h_rows, v_rows = _rows(x), _rows(h), _rows(v)
    features, taps = h.shape[1] * consumer.taps, consumer.taps
    weight = update.new_zeros(taps, h_rows.channels, len(update), dtype=torch.float32)
    weight[:, : h.shape[1]] = update[:, :features].unflatten(1, (h.shape[1], taps)).permute(2, 1, 0)
    constant = update[:, features:].float().sum(1)  # nothing without a bias
    left = v_rows.data.new_zeros(*v_rows.data.shape[:-1], v_rows.channels, dtype=torch.float32)
    out = Rows(left, v_rows.channels, v_rows.channels)
    engine.subtract(h_rows, v_rows, weight, constant, out, consumer, precision)
    return _sides(x_rows, h_rows, x_rows), out


def _draws(signs: Tensor | None, x: Tensor) -> Tensor:
    """Signs, one row for each draw, after a row of ones."""
    ones = x.new_ones(1, len(x), dtype=torch.float32)
    return ones if signs is None else torch.cat([ones, signs.to(torch.float32)])
