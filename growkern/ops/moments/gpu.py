"""The second moments on a GPU: one way for Triton and for CUDA, which differ in the kernels of their engines."""

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from growkern.ops.moments import reference
from growkern.ops.moments.calls import Call, Residual, Six, Three
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan
from growkern.ops.moments.rows import Rows, read_by, rows_of, sources
from growkern.ops.moments.schedule import Schedule, Tiles, bucket, schedule

APART_BYTES = 256 * 2**20  # that sums of single images, or of rows that share their signs, may take at once
SPLITS_ELEMENTS = 4 * 2**20  # that partial sums may take whatever the size of inputs and results


_captured: list[Schedule] = []  # CUDA graphs read them whenever they are replayed


class Engine(Protocol):
    """The kernels that a backend has to have. Nothing in them waits for the device."""

    def tiles(self, plan: Plan, dtype: torch.dtype, precision: str, device: torch.device) -> Tiles:
        """Choose how to cut the products of a plan, whose operands have the given dtype."""

    def correlate(
        self,
        us: Sequence[Rows],
        vs: Sequence[Rows],
        out: Tensor,
        plan: Schedule,
        precision: str,
        signs: Tensor | None,
    ) -> None:
        """Sum the products of a schedule into the workspace; us and vs are x, h, v and the ones.

        Draw 0 is of ones, and the others those of `signs`, one for each row or image.
        """

    def reduce(self, workspace: Tensor, plan: Schedule) -> None:
        """Add up the splits into their slots, in order."""

    def combine(self, workspace: Tensor, plan: Schedule, signs: Tensor, add: bool) -> None:
        """Add up the splits, of one sign each, under draws of ones and of `signs` into their slots, or to those."""

    def assemble(self, slots: Tensor, plan: Schedule, results: Sequence[Tensor]) -> None:
        """Write results from (draws, slots); each has as many draws."""

    def subtract(
        self, h: Rows, v: Rows, channels: int, weight: Tensor, out: Rows, consumer: ConvGeometry, precision: str
    ) -> None:
        """Write v − (weight ∗ h + bias); weight is (taps · channels of h + 1, channels of v), the bias its last row.

        Rows of v, weight and `out` are filled up; those of weight with zeros.
        """

    def subtract_tile(self, targets: int) -> tuple[int, int]:
        """Count the positions and channels of v that one program of `subtract_group` takes."""

    def pack(self, copies: Tensor, programs: int, source: Tensor, target: Tensor) -> None:
        """Copy maps to rows of channels, as a table of COPY_FIELDS columns says, between the dtypes of two tensors."""

    def subtract_group(
        self, table: Tensor, programs: int, tile: tuple[int, int], like: Tensor, out: Tensor, align: int, precision: str
    ) -> None:
        """Subtract for several sites: a table of SUBTRACT_FIELDS columns; `like` and `out` tell the dtypes."""

    def correlate_group(
        self, sources: Tensor, u: Tensor, v: Tensor, out: Tensor, plan: Schedule, precision: str, draws: Tensor | None
    ) -> None:
        """Correlate for several sites, u and v telling the dtypes.

        Rows of `sources` are addresses, pitches and channels in units of 16 bytes, and images; those of `draws`
        addresses of signs, their pitches and their numbers, as for `combine_group`.
        """

    def combine_group(self, workspace: Tensor, plan: Schedule, draws: Tensor) -> None:
        """Combine for several sites; rows of `draws` are addresses of signs, their pitches and their numbers."""

    def assemble_group(self, slots: Tensor, plan: Schedule, results: Tensor) -> None:
        """Assemble for several sites: the addresses of the results are in a table."""


def linear_moments(engine: Engine, x: Tensor, h: Tensor, v: Tensor, x_bias: bool, h_bias: bool, precision: str) -> Six:
    """Sum the joint second moment of x, h and v."""
    return moments(engine, Call(x, h, v, x_bias=x_bias, h_bias=h_bias, precision=precision))


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
    geometries = ConvGeometry.unpack(producer), ConvGeometry.unpack(consumer)
    return moments(engine, Call(x, h, v, *geometries, kernel, x_bias, h_bias, precision))


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
    """Sum x v⊥ᵀ, and x v⊥ᵀ and h v⊥ᵀ under every draw."""
    call = Call(x, h, v, None, None, "full", x_bias, h_bias, precision)
    return residual(engine, Residual(call, update, signs, rows_per_sign))


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
    """Sum x v⊥ᵀ over images and positions, as it is and under every draw, and h v⊥ᵀ likewise."""
    geometries = ConvGeometry.unpack(producer), ConvGeometry.unpack(consumer)
    return residual(engine, Residual(Call(x, h, v, *geometries, kernel, x_bias, h_bias, precision), update, signs))


def moments(engine: Engine, call: Call) -> Six:
    """Sum the moments of one site."""
    x, h, v, made, read, kernel, x_bias, h_bias, precision = call
    if is_plain(x):
        if made is None or read is None:
            return reference.linear_moments(x, h, v, x_bias, h_bias, precision)
        return reference.conv2d_moments(x, h, v, made.pack(), read.pack(), kernel, x_bias, h_bias, precision)
    plan = call.plan()
    with torch.cuda.device_of(x):
        x_rows, h_rows, v_rows = (rows_of(each) for each in call.operands())
        sides = sources(x_rows, h_rows, v_rows)
        table = _schedule(engine, plan, v_rows, 1, None, precision)
        workspace = x.new_empty(table.elements, dtype=torch.float32)
        engine.correlate(sides, sides, workspace, table, precision, None)
        engine.reduce(workspace, table)
        results = [x.new_empty(shape, dtype=torch.float32) for shape in plan.shapes]
        engine.assemble(table.slots_of(workspace), table, [result[None] for result in results])
        return call.six(results)


def residual(engine: Engine, call: Residual) -> Three:
    """Form v⊥ once and sum up its products, with signs multiplied in as they are read or combined afterwards."""
    x, h, v, made, read, kernel, x_bias, h_bias, precision = call.call
    if is_plain(x):
        if made is None or read is None:
            return reference.linear_residual(x, h, v, call.update, *call[2:], x_bias, h_bias, precision)
        geometries = made.pack(), read.pack()
        return reference.conv2d_residual(
            x, h, v, call.update, *geometries, kernel, call.signs, x_bias, h_bias, precision
        )
    plan, signs = call.plan(), None if call.signs is None else call.tensors()[4]
    with torch.cuda.device_of(x):
        us, left = _read(engine, call)
        if signs is None or not call.apart():
            table = _schedule(engine, plan, left, 1 + call.draws, None, precision)
            workspace = x.new_empty(table.elements, dtype=torch.float32)
            engine.correlate(us, sources(left, left, left), workspace, table, precision, signs)
            engine.reduce(workspace, table)
        else:
            slots = sum(math.prod(plan.extent(number)) for number in range(len(plan.products)))
            runs = max(1, APART_BYTES // (4 * max(1, slots)))
            whole = left._replace(data=left.data[: runs * call.rows_per_sign])
            table = _schedule(engine, plan, whole, 1 + call.draws, call.rows_per_sign, precision)
            workspace = x.new_empty(table.elements, dtype=torch.float32)
            for start in range(0, signs.shape[1], runs):
                some = slice(start * call.rows_per_sign, (start + runs) * call.rows_per_sign)
                sides = [each._replace(data=each.data[some]) for each in us[:3]]
                part = left._replace(data=left.data[some])
                engine.correlate(sources(*sides), sources(part, part, part), workspace, table, precision, None)
                engine.combine(workspace, table, signs[:, start : start + runs], start > 0)
        return _residuals(engine, plan, table, table.slots_of(workspace))


def is_capturing(device: torch.device) -> bool:
    """Whether launches go to a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_plain(x: Tensor) -> bool:
    """float64 is for checks, and nothing needs no kernel."""
    return x.dtype == torch.float64 or len(x) == 0


def _residuals(engine: Engine, plan: Plan, table: Schedule, sums: Tensor) -> Three:
    """Assemble xr from the first draw, which is all ones, and the nulls from the others."""
    xr, *_ = firsts = [sums.new_empty(1, *shape) for shape in plan.shapes]
    xr_null, *hr_null = nulls = [sums.new_empty(len(sums) - 1, *shape) for shape in plan.shapes]
    engine.assemble(sums[:1], table, firsts)
    engine.assemble(sums[1:], table, nulls)
    targets = plan.channels[2]
    return xr.squeeze(0), xr_null, hr_null[0] if hr_null else sums.new_empty(len(sums) - 1, 0, targets)


def _schedule(engine: Engine, plan: Plan, v: Rows, draws: int, run: int | None, precision: str) -> Schedule:
    device, images = v.data.device, bucket(len(v.data))
    tiles = engine.tiles(plan, v.data.dtype, precision, device)
    outside = sum(images * c * h * w for c, (h, w) in zip(plan.channels, plan.sizes, strict=True))
    outside += draws * sum(height * width for height, width in plan.shapes)
    most = max(SPLITS_ELEMENTS, outside // 4)
    runs = None if run is None else (run,)
    table = schedule((plan,), (images,), draws, runs, tiles, processors_of(device), most, device)
    if is_capturing(device):
        _captured.append(table)
    return table


@functools.cache
def processors_of(device: torch.device) -> int:
    """Count the multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _read(engine: Engine, call: Residual) -> tuple[list[Rows], Rows]:
    """Read the sides x and h of products, and form v⊥ = v − update·h in float32."""
    x, h, v, _, consumer, *_, precision = call.call
    consumer, update = consumer or ConvGeometry(1), call.update
    if (read := h if h.ndim == 2 else read_by(consumer, h, v)) is not h:
        h, consumer = read, ConvGeometry(1)
    x_rows, h_rows, v_rows = rows_of(x), rows_of(h), rows_of(v)
    taps, targets = consumer.taps, len(update)
    features = h.shape[1] * taps
    weight = update.new_zeros(features + 1, targets + -targets % 4, dtype=torch.float32)
    patches = update[:, :features].unflatten(1, (h.shape[1], taps)).permute(2, 1, 0)
    weight[:features, :targets].unflatten(0, (taps, h.shape[1])).copy_(patches)
    weight[features : update.shape[1], :targets] = update[:, features:].T  # nothing without a bias
    left = v_rows.data.new_empty(*v_rows.data.shape[:-1], v_rows.channels, dtype=torch.float32)
    out = Rows(left, v_rows.channels, v_rows.channels)
    engine.subtract(h_rows, v_rows, h.shape[1], weight, out, consumer, precision)
    return sources(x_rows, h_rows, x_rows), out
