"""Sites that are summed together, laid out: small ones cost little but the host's time, so it is all done once.

One row of numbers holds the sizes and addresses that the kernels of a call read. A call adds where its tensors lie and
copies the row over; all else that follows from shapes is kept, on the device or here.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from growkern.ops.moments import gpu
from growkern.ops.moments.calls import Call, Residual
from growkern.ops.moments.geometry import ConvGeometry
from growkern.ops.moments.plan import Plan
from growkern.ops.moments.rows import (
    COPY_FIELDS,
    ONES,
    PACK_CHANNELS,
    PACK_PIXELS,
    SUBTRACT_FIELDS,
    ones,
    place,
    read_by,
)
from growkern.ops.moments.schedule import Tiles, bucket, schedule

# What an address counts from: nothing, the memory of a call, the ones, then of each site its results and its tensors.
NOTHING, MEMORY, THE_ONES, SITES = range(4)

Entry = int | tuple[int, int]  # a number, or what an address counts from and the bytes between
Side = tuple[Entry, int, int]  # address, pitch, channels
View = tuple[tuple[int, ...], tuple[int, ...], int]  # sizes, strides and offset of a result


class _Table:
    """Rows of numbers and addresses; programs of a launch belong to rows in turn where there are programs."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int]] = []
        self.programs = 0

    def add(self, *row: Entry) -> None:
        self.entries += [entry if isinstance(entry, tuple) else (NOTHING, entry) for entry in row]

    def launch(self, programs: int, *row: Entry) -> None:
        if programs:
            self.add(self.programs, *row)
            self.programs += programs


class Layout:
    """All of a group of sites but where their tensors lie. Sites are added, then it is finished, then it runs.

    Parameters
    ----------
    engine : gpu.Engine
        The kernels.
    like : Call
        One with the device, dtype and precision of all sites, and whose v is cut like theirs where v⊥ is formed.
    draws : int
        Of signs, as many for every site.
    apart : bool
        Whether sums of what shares its signs are kept apart, and combined under all draws.
    """

    def __init__(self, engine: gpu.Engine, like: Call, draws: int = 0, apart: bool = False) -> None:
        self._engine, self._precision, self._draws, self._apart = engine, like.precision, draws, apart
        self._device, self._align = like.x.device, 16 // like.x.itemsize
        self._tile = engine.subtract_tile(like.v.shape[1])
        self._ones = ones(like.x.dtype, like.x.device)
        self._plans: list[Plan] = []
        self._images: list[int] = []
        self._runs: list[int] = []
        self._reads: list[tuple[int, ConvGeometry]] = []  # sites whose h is read as one patch
        self._views: list[list[View]] = []
        self._elements: list[int] = []  # of the results of each site
        self._memory, self._site, self._taken = 0, SITES, 0  # bytes; base of the next site, and elements of its results
        self._tables = [_Table() for _ in range(6)]
        self._copies, self._weights, self._left, self._sources, self._signs, self._targets = self._tables

    def add_moments(self, call: Call) -> None:
        """Append the moments of a site; its tensors are x, h and v."""
        plan = call.plan()
        sides = [self._side(*side) for side in enumerate(self._operands(call))]
        views = [_view(self._result(shape), *shape) for shape in plan.shapes]
        if call.full:
            views.insert(1, _view(0, plan.shapes[0][0], 0))  # no xh
        self._close(plan, call, 1, sides, views, 3)

    def add_residual(self, residual: Residual) -> None:
        """Append the products of a site with v⊥; its tensors are x, h, v, the update and the signs if there are any."""
        call, plan, tensors, draws = residual.call, residual.plan(), residual.tensors(), self._draws
        x, h, v = self._operands(call)
        read = ConvGeometry(1) if call.consumer is None or h is not call.h else call.consumer
        x_side, h_side, v_side = self._side(0, x), self._side(1, h), self._side(2, v)
        (height, width), (rows, columns) = (tensor.shape[2:] if tensor.ndim == 4 else (1, 1) for tensor in (h, v))
        positions, targets = len(v) * rows * columns, v.shape[1]
        left: Side = (self._reserve(4 * positions * v_side[2]), v_side[2], v_side[2])
        weight, pitch = self._weight(residual.update, h.shape[1], read.taps, call.h_bias)
        sides = (entry for side in (h_side, v_side) for entry in (side[0], side[1] // self._align))
        sizes = positions, rows * columns, columns, h.shape[1], targets, height, width, read.kernel_size[1]
        steps = *read.stride, *read.padding, *read.dilation, read.taps
        self._left.launch(
            math.prod(-(-size // tile) for size, tile in zip((positions, targets), self._tile, strict=True)),
            *(*sides, weight, pitch // 4, left[0], left[1] // self._align, *sizes, *steps),
        )
        if draws:
            samples = tensors[4].shape[1]
            self._signs.add((self._site + 5, 0), samples, samples)
        starts = [self._result((1 + draws, *shape)) for shape in plan.shapes]
        nulls = [
            _view(start + math.prod(shape), draws, *shape) for start, shape in zip(starts, plan.shapes, strict=True)
        ]
        if call.full:
            nulls.append(_view(0, draws, 0, targets))  # no hr
        views = [_view(starts[0], *plan.shapes[0]), *nulls]
        self._close(plan, call, residual.rows_per_sign, [x_side, h_side, left], views, len(tensors))

    def finish(self, tiles: Tiles) -> None:
        """Make the tables, after the last site."""
        images, runs = tuple(map(bucket, self._images)), tuple(self._runs) if self._apart else None
        device, processors = self._device, gpu.processors_of(self._device)
        plans = tuple(self._plans)
        draws, most = 1 + self._draws, gpu.SPLITS_ELEMENTS
        self._schedule = schedule(plans, images, draws, runs, tiles, processors, most, device)
        _, start = self._reserve(4 * self._schedule.elements)
        self._workspace = slice(start // 4, start // 4 + self._schedule.elements)
        for table in self._tables:  # each starts at whole 16 bytes
            table.entries += [(NOTHING, 0)] * (len(table.entries) % 2)
        entries = np.array([entry for table in self._tables for entry in table.entries], np.int64).reshape(-1, 2)
        self._owners, self._numbers = entries[:, 0].copy(), entries[:, 1].copy()
        self._sizes = [len(table.entries) for table in self._tables]

    def run(self, sites: list[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """Sum up the sites, given in the order in which they were added."""
        for number, consumer in self._reads:
            x, h, v, *others = sites[number]
            sites[number] = (x, read_by(consumer, h, v), v, *others)
        memory = torch.empty(self._memory // 4, dtype=torch.float32, device=self._device)
        results = [torch.empty(count, dtype=torch.float32, device=self._device) for count in self._elements]
        bases = [0, memory.data_ptr(), self._ones.data_ptr()]
        for own, site in zip(results, sites, strict=True):
            bases += [own.data_ptr(), *[tensor.data_ptr() for tensor in site]]
        numbers = _upload(np.array(bases, np.int64)[self._owners] + self._numbers, self._device)
        copies, weights, left, sources, signs, targets = numbers.split(self._sizes)
        engine, tables, precision, like = self._engine, self._schedule, self._precision, sites[0][0]
        engine.pack(copies.view(-1, COPY_FIELDS), self._copies.programs, like, like)
        if self._left.programs:
            engine.pack(weights.view(-1, COPY_FIELDS), self._weights.programs, sites[0][3], memory)
            table = left.view(-1, SUBTRACT_FIELDS)
            engine.subtract_group(table, self._left.programs, self._tile, like, memory, self._align, precision)
        workspace = memory[self._workspace]
        multiplied = signs if self._draws and not self._apart else None
        v = memory if self._left.programs else like
        engine.correlate_group(sources, like, v, workspace, tables, precision, multiplied)
        if self._draws and self._apart:
            engine.combine_group(workspace, tables, signs)
        else:
            engine.reduce(workspace, tables)
        engine.assemble_group(tables.slots_of(workspace), tables, targets)
        # What is kept of one site keeps nothing of another.
        return [
            tuple([own.as_strided(*each) for each in views]) for own, views in zip(results, self._views, strict=True)
        ]

    def _operands(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        operands = call.operands()
        if operands[1] is not call.h and call.consumer is not None:
            self._reads.append((len(self._plans), call.consumer))
        return operands

    def _side(self, number: int, tensor: Tensor) -> Side:
        """Find the rows of a tensor, or lay out a copy of them."""
        pitch, copied = place(tensor)
        at = self._site + 1 + number, 0
        return (
            (self._copy(self._copies, at, copied, tensor.itemsize), pitch, pitch)
            if copied
            else (at, pitch, tensor.shape[1])
        )

    def _weight(self, update: Tensor, channels: int, taps: int, bias: bool) -> tuple[Entry, int]:
        """Lay out a copy of an update, (taps · channels + 1, targets), its bias last."""
        targets, features, item = len(update), taps * channels, update.itemsize
        by_target, by_feature = update.stride()
        at, pitch = self._site + 4, targets + -targets % 4
        weight = self._reserve(4 * (features + 1) * pitch)
        # Taps are its images, channels its pixels and targets its channels.
        taken = features, targets, pitch, channels, channels, by_feature, by_target, 0, taps * by_feature
        last = 1, targets if bias else 0, pitch, 1, 1, 0, by_target, 0, 0
        self._weights.launch(_pack_programs(features, pitch), (at, 0), weight, *taken)
        below = weight[0], weight[1] + 4 * features * pitch
        self._weights.launch(_pack_programs(1, pitch), (at, features * by_feature * item), below, *last)
        return weight, pitch

    def _copy(self, table: _Table, at: tuple[int, int], copied: tuple[int, ...], itemsize: int) -> tuple[int, int]:
        pixels, _, pitch, *_ = copied
        to = self._reserve(itemsize * pixels * pitch)
        table.launch(_pack_programs(pixels, pitch), at, to, *copied)
        return to

    def _reserve(self, count: int) -> tuple[int, int]:
        """Set bytes of the memory aside."""
        start = self._memory
        self._memory += -(-count // 16) * 16
        return MEMORY, start

    def _result(self, shape: tuple[int, ...]) -> int:
        """Set a result aside, 16 bytes aligned."""
        start = self._taken
        self._taken += -(-math.prod(shape) // 4) * 4
        self._targets.add((self._site, 4 * start))
        return start

    def _close(self, plan: Plan, call: Call, run: int, sides: list[Side], views: list[View], tensors: int) -> None:
        for address, pitch, channels in sides:
            self._sources.add(address, pitch // self._align, channels // self._align, len(call.x))
        self._sources.add((THE_ONES, 0), ONES // self._align, ONES // self._align, len(call.x))
        self._plans.append(plan)
        self._images.append(len(call.x))
        self._runs.append(run)
        self._views.append(views)
        self._elements.append(self._taken)
        self._site, self._taken = self._site + 1 + tensors, 0


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for it."""
    host = torch.from_numpy(array)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def _pack_programs(pixels: int, pitch: int) -> int:
    return -(-pixels // PACK_PIXELS) * -(-pitch // PACK_CHANNELS)


def _view(offset: int, *shape: int) -> View:
    return shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), offset
