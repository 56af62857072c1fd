"""The second moments on a GPU: one way for Triton and for CUDA, which differ in the kernels of their engines."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from growkern.backend import register
from growkern.ops.moments import reference
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan, conv2d_plan, linear_plan, residual_plan
from growkern.ops.moments.rows import (
    COPY_FIELDS,
    ONES,
    PACK_CHANNELS,
    PACK_PIXELS,
    Rows,
    alignment,
    is_far,
    ones,
    place,
    read_by,
    rows_of,
    sources,
)
from growkern.ops.moments.schedule import Schedule, Tiles, schedule

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]

PER_IMAGE_BYTES = 256 * 2**20  # that the sums of single images may take at once
SPLITS_ELEMENTS = 4 * 2**20  # that partial sums may take whatever the size of inputs and results


_captured: list[Schedule] = []  # CUDA graphs read them whenever they are replayed


class Call(NamedTuple):
    """One call of `linear_moments`, or with geometries of `conv2d_moments`."""

    x: Tensor
    h: Tensor
    v: Tensor
    producer: ConvGeometry | None = None
    consumer: ConvGeometry | None = None
    kernel: str = "full"
    x_bias: bool = False
    h_bias: bool = False
    precision: str = "ieee"

    @property
    def full(self) -> bool:
        """Whether there is no xh."""
        return self.producer is not None and self.kernel == "full"

    def plan(self) -> Plan:
        """Plan the moments."""
        if self.producer is None or self.consumer is None:
            return linear_plan((self.x.shape[1], self.h.shape[1], self.v.shape[1]), self.x_bias, self.h_bias)
        shapes = _shapes(self.x, self.h, self.v)
        return conv2d_plan(*shapes, self.producer, self.consumer, self.full, self.x_bias, self.h_bias)

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give x, h and v, with the taps of h as channels where the consumer has one output."""
        h = self.h if self.consumer is None else read_by(self.consumer, self.h, self.v)
        return self.x, h, self.v

    def six(self, results: list[Tensor]) -> Six:
        """Name the results of the plan, and give an empty xh where it has none."""
        if self.full:
            results.insert(1, results[0].new_empty(len(results[0]), 0))
        xx, xh, xv, hh, hv, vv = results
        return xx, xh, xv, hh, hv, vv

    def alone(self, engine: "Engine") -> Six:
        """Sum the moments of this site only."""
        x, h, v, made, read, kernel, x_bias, h_bias, precision = self
        if made is None or read is None:
            return linear_moments(engine, x, h, v, x_bias, h_bias, precision)
        return conv2d_moments(engine, x, h, v, made.pack(), read.pack(), kernel, x_bias, h_bias, precision)


class Engine(Protocol):
    """The kernels that a backend has to have. Nothing in them waits for the device."""

    def tiles(self, plan: Plan, dtype: torch.dtype, precision: str, device: torch.device) -> Tiles:
        """Choose how to cut the products of a plan, whose operands have the given dtype."""

    def correlate(
        self, us: Sequence[Rows], vs: Sequence[Rows], out: Tensor, plan: Schedule, precision: str, signs: Tensor | None
    ) -> None:
        """Sum the products of a schedule into the workspace; us and vs are x, h, v and the ones."""

    def reduce(self, workspace: Tensor, plan: Schedule) -> None:
        """Add up the splits into their slots, in order."""

    def assemble(self, slots: Tensor, plan: Schedule, results: Sequence[Tensor]) -> None:
        """Write results from (draws, slots); each has as many draws."""

    def pack(self, copies: Tensor, programs: int, anchor: Tensor) -> None:
        """Copy maps to rows of channels, as a table of COPY_FIELDS columns says; all have the anchor's dtype."""

    def correlate_group(
        self, sources: Tensor, ones: Rows, out: Tensor, plan: Schedule, precision: str, align: int
    ) -> None:
        """Correlate for several sites: addresses, pitches and channels, in units of `align`, are in a table."""

    def assemble_group(self, slots: Tensor, plan: Schedule, results: Tensor) -> None:
        """Assemble for several sites: the addresses of the results are in a table."""

    def subtract(
        self, h: Rows, v: Rows, weight: Tensor, bias: Tensor, out: Rows, consumer: ConvGeometry, precision: str
    ) -> None:
        """Write v − (weight ∗ h + bias); weight is (taps, channels of h, channels of v)."""


def linear_moments(engine: Engine, x: Tensor, h: Tensor, v: Tensor, x_bias: bool, h_bias: bool, precision: str) -> Six:
    """Sum the joint second moment of x, h and v."""
    if _plain(x):
        return reference.linear_moments(x, h, v, x_bias, h_bias, precision)
    call = Call(x, h, v, x_bias=x_bias, h_bias=h_bias, precision=precision)
    return call.six(_moments(engine, call.plan(), call.operands(), precision))


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
    made, read = ConvGeometry.unpack(producer), ConvGeometry.unpack(consumer)
    call = Call(x, h, v, made, read, kernel, x_bias, h_bias, precision)
    return call.six(_moments(engine, call.plan(), call.operands(), precision))


def linear_residual(
    engine: Engine,
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
    """Sum x v⊥ᵀ, and x v⊥ᵀ and h v⊥ᵀ under every draw, whose signs are multiplied in as v⊥ is read."""
    if _plain(x):
        return reference.linear_residual(x, h, v, update, signs, rows_per_sign, x_bias, h_bias, precision)
    one = ConvGeometry(1)
    channels = (x.shape[1], h.shape[1], v.shape[1])
    plan = residual_plan(channels, ((1, 1),) * 3, one, one, False, x_bias, h_bias)
    with torch.cuda.device_of(x):
        us, left = _read(engine, x, h, v, update, one, h_bias, precision)
        draws = _draws(signs, x).repeat_interleave(rows_per_sign, 1)[:, : len(x)].contiguous()
        return _signed(engine, plan, us, left, draws, precision)


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
        if len(draws) == 1 or h.shape[2] * h.shape[3] <= len(draws):
            return _signed(engine, plan, us, left, draws, precision)
        slots = sum(math.prod(plan.extent(number)) for number in range(len(plan.products)))
        step = max(1, PER_IMAGE_BYTES // (4 * max(1, slots)))
        sums = draws.new_zeros(len(draws), slots)
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            part = left._replace(data=left.data[some])
            table = _schedule(engine, plan, part, 1, True, precision)
            workspace = x.new_empty(table.elements, dtype=torch.float32)
            sides = [each._replace(data=each.data[some]) for each in us[:3]]
            engine.correlate(sources(*sides), sources(part, part, part), workspace, table, precision, None)
            sums.addmm_(draws[:, some], workspace.view(len(part.data), slots))
        return _residuals(engine, plan, table, sums)


def grouped_moments(engine: Any, calls: Sequence[Call]) -> list[Six]:
    """Sum the moments of several sites: those of one dtype and about one width in one launch of each kernel."""
    results: list[Six | None] = [None] * len(calls)
    groups: dict[tuple[Any, ...], list[int]] = {}
    with torch.cuda.device_of(calls[0].x):
        capturing = _capturing(calls[0].x.device)  # addresses would come from memory that is not kept
    for number, call in enumerate(calls):
        plan = call.plan()
        if capturing or _plain(call.x) or any(is_far(tensor) for tensor in call[:3]):
            results[number] = call.alone(engine)
        else:
            tiles = engine.tiles(plan, call.x.dtype, call.precision, call.x.device)
            key = (call.x.device, call.x.dtype, call.precision, tiles)
            groups.setdefault(key, []).append(number)
    for (*_, tiles), members in groups.items():
        for number, six in zip(members, _group(engine, [calls[n] for n in members], tiles), strict=True):
            results[number] = six
    return [six for six in results if six is not None]


def serve(engine: Any, backend: str) -> None:
    """Register the ops with the kernels of an engine as those of a backend."""
    for op in (linear_moments, linear_residual, conv2d_moments, conv2d_residual, grouped_moments):
        register(op.__name__, backend)(functools.partial(op, engine))


def _group(engine: Any, calls: Sequence[Call], tiles: Tiles) -> list[Six]:
    x, precision = calls[0].x, calls[0].precision
    with torch.cuda.device_of(x):
        plans = tuple(call.plan() for call in calls)
        copies: list[tuple[int, ...]] = []
        programs, sides = 0, []
        for call in calls:
            for tensor in call.operands():
                rows, copy = place(tensor)
                if copy:
                    copies.append((programs, *copy))
                    programs += -(-copy[2] // PACK_PIXELS) * -(-copy[4] // PACK_CHANNELS)
                sides.append(rows)
            sides.append(Rows(ones(x.dtype, x.device), ONES, ONES))
        align = alignment(*sides)
        shapes = [shape for plan in plans for shape in plan.shapes]
        results = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
        # Addresses go over in one copy.
        numbers = [*itertools.chain(*copies)]
        numbers += itertools.chain(*((s.data.data_ptr(), s.pitch // align, s.channels // align) for s in sides))
        numbers += [result.data_ptr() for result in results]
        table = torch.tensor(numbers, dtype=torch.int64, pin_memory=x.is_cuda).to(x.device, non_blocking=True)
        where = [len(copies) * COPY_FIELDS, len(sides) * 3, len(results)]
        packing, sources, targets = table.split(where)
        engine.pack(packing.view(-1, COPY_FIELDS), programs, x)
        images = tuple(len(call.x) for call in calls)
        plan = schedule(plans, images, 1, False, tiles, _processors(x.device), SPLITS_ELEMENTS, x.device)
        workspace = x.new_empty(plan.elements, dtype=torch.float32)
        engine.correlate_group(sources, sides[-1], workspace, plan, precision, align)
        engine.reduce(workspace, plan)
        engine.assemble_group(workspace[None, : plan.slots], plan, targets)
        found = iter(results)
        return [call.six([next(found) for _ in each.shapes]) for call, each in zip(calls, plans, strict=True)]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
        x_rows, h_rows, v_rows = (rows_of(each) for each in tensors)
        sides = sources(x_rows, h_rows, v_rows)
        table = _schedule(engine, plan, v_rows, 1, False, precision)
        workspace = x.new_empty(table.elements, dtype=torch.float32)
        engine.correlate(sides, sides, workspace, table, precision, None)
        engine.reduce(workspace, table)
        results = [x.new_empty(shape, dtype=torch.float32) for shape in plan.shapes]
        engine.assemble(workspace[None, : table.slots], table, [result[None] for result in results])
        return results


def _signed(engine: Engine, plan: Plan, us: list[Rows], left: Rows, draws: Tensor, precision: str) -> Three:
    """Sum the products under every draw, signs multiplied in as v⊥ is read."""
    table = _schedule(engine, plan, left, len(draws), False, precision)
    workspace = draws.new_empty(table.elements)
    signs = draws if len(draws) > 1 else None
    engine.correlate(us, sources(left, left, left), workspace, table, precision, signs)
    engine.reduce(workspace, table)
    return _residuals(engine, plan, table, workspace[: len(draws) * table.slots].view(len(draws), -1))


def _residuals(engine: Engine, plan: Plan, table: Schedule, sums: Tensor) -> Three:
    """Assemble xr from the first draw, which is all ones, and the nulls from the others."""
    xr, *_ = firsts = [sums.new_empty(1, *shape) for shape in plan.shapes]
    xr_null, *hr_null = nulls = [sums.new_empty(len(sums) - 1, *shape) for shape in plan.shapes]
    engine.assemble(sums[:1], table, firsts)
    engine.assemble(sums[1:], table, nulls)
    targets = plan.channels[2]
    return xr.squeeze(0), xr_null, hr_null[0] if hr_null else sums.new_empty(len(sums) - 1, 0, targets)


def _schedule(engine: Engine, plan: Plan, v: Rows, draws: int, per_image: bool, precision: str) -> Schedule:
    device, images = v.data.device, len(v.data)
    tiles = engine.tiles(plan, v.data.dtype, precision, device)
    outside = sum(images * c * h * w for c, (h, w) in zip(plan.channels, plan.sizes, strict=True))
    outside += draws * sum(height * width for height, width in plan.shapes)
    most = max(SPLITS_ELEMENTS, outside // 4)
    table = schedule((plan,), (images,), draws, per_image, tiles, _processors(device), most, device)
    if _capturing(device):
        _captured.append(table)
    return table


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _read(
    engine: Engine, x: Tensor, h: Tensor, v: Tensor, update: Tensor, consumer: ConvGeometry, bias: bool, precision: str
) -> tuple[list[Rows], Rows]:
    """Read the sides x and h of products, and form v⊥ = v − update·h in float32."""
    if h.ndim == 4 and (read := read_by(consumer, h, v)) is not h:
        h, consumer = read, ConvGeometry(1)
    x_rows, h_rows, v_rows = rows_of(x), rows_of(h), rows_of(v)
    features, taps = h.shape[1] * consumer.taps, consumer.taps
    weight = update.new_zeros(taps, h_rows.channels, len(update), dtype=torch.float32)
    weight[:, : h.shape[1]] = update[:, :features].unflatten(1, (h.shape[1], taps)).permute(2, 1, 0)
    constant = update[:, features:].float().sum(1)  # nothing without a bias
    left = v_rows.data.new_zeros(*v_rows.data.shape[:-1], v_rows.channels, dtype=torch.float32)
    out = Rows(left, v_rows.channels, v_rows.channels)
    engine.subtract(h_rows, v_rows, weight, constant, out, consumer, precision)
    return sources(x_rows, h_rows, x_rows), out


def _draws(signs: Tensor | None, x: Tensor) -> Tensor:
    """Signs, one row for each draw, after a row of ones."""
    if signs is None:
        return x.new_ones(1, len(x), dtype=torch.float32)
    return F.pad(signs.to(torch.float32), (0, 0, 1, 0), value=1.0)
