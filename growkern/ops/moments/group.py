"""The moments of several sites in one launch of each kernel: which of them go together, and what is known of them."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from growkern.backend import register
from growkern.ops.moments import gpu
from growkern.ops.moments.calls import Call, Residual, Six, Three
from growkern.ops.moments.layout import Layout
from growkern.ops.moments.rows import is_far

APART_ELEMENTS = 4 * 2**20  # that the sums of runs may take of a site that is not summed alone
KEPT = 256  # groups of sites whose layouts are kept

_kept: dict[Hashable, list[tuple[list[int], Layout]]] = {}


def grouped_moments(engine: gpu.Engine, calls: Sequence[Call]) -> list[Six]:
    """Sum the moments of several sites: those of one dtype and about one width in one launch of each kernel."""
    tensors = [call[:3] for call in calls]
    key = tuple([(*map(_facts, call[:3]), *call[3:]) for call in calls])
    return _run(engine, key, calls, tensors, gpu.moments, _moments)


def grouped_residuals(engine: gpu.Engine, calls: Sequence[Residual]) -> list[Three]:
    """Sum the products with v⊥ of several sites: those cut alike, with as many draws, in one launch of each kernel."""
    tensors: list[Sequence[Tensor]] = []
    key = []
    for call in calls:
        tensors.append(call.tensors())
        key.append((*map(_facts, tensors[-1]), *call.call[3:], call.rows_per_sign))
    return _run(engine, tuple(key), calls, tensors, gpu.residual, _residuals)


def serve(engine: gpu.Engine, backend: str) -> None:
    """Register the ops and groups with the kernels of an engine as those of a backend."""
    alone = gpu.linear_moments, gpu.linear_residual, gpu.conv2d_moments, gpu.conv2d_residual
    for op in (*alone, grouped_moments, grouped_residuals):
        register(op.__name__, backend)(functools.partial(op, engine))


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """Tell what a layout depends on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def _run(
    engine: Any,
    key: tuple[Any, ...],
    calls: Sequence[Any],
    tensors: Sequence[Sequence[Tensor]],
    alone: Callable[[gpu.Engine, Any], Any],
    planned: Callable[[gpu.Engine, Sequence[Any]], list[tuple[list[int], Layout]]],
) -> list[Any]:
    """Sum what belongs together, and every other site alone."""
    key = engine, alone, key
    groups = _kept.get(key)
    if groups is None:
        for call in calls:
            call.check()
    with torch.cuda.device_of(tensors[0][0]):
        if gpu.is_capturing(tensors[0][0].device):  # addresses would come from memory that is not kept
            return [alone(engine, call) for call in calls]
        if groups is None:
            groups = planned(engine, calls)
            if len(_kept) >= KEPT:
                del _kept[next(iter(_kept))]
            _kept[key] = groups
        results: list[Any] = [None] * len(calls)
        for members, layout in groups:
            for number, found in zip(members, layout.run([tensors[each] for each in members]), strict=True):
                results[number] = found
    return [alone(engine, call) if found is None else found for call, found in zip(calls, results, strict=True)]


def _moments(engine: gpu.Engine, calls: Sequence[Call]) -> list[tuple[list[int], Layout]]:
    together: dict[tuple[Any, ...], list[int]] = {}
    for number, call in enumerate(calls):
        if _fits(call):
            tiles = engine.tiles(call.plan(), call.x.dtype, call.precision, call.x.device)
            together.setdefault((call.x.device, call.x.dtype, call.precision, tiles), []).append(number)
    groups = []
    for (*_, tiles), members in together.items():
        layout = Layout(engine, calls[members[0]], 0)
        for number in members:
            layout.add_moments(calls[number])
        layout.finish(tiles)
        groups.append((members, layout))
    return groups


def _residuals(engine: gpu.Engine, calls: Sequence[Residual]) -> list[tuple[list[int], Layout]]:
    together: dict[tuple[Any, ...], list[int]] = {}
    totals: dict[tuple[Any, ...], int] = {}
    for number, (call, update, *_) in enumerate(calls):
        plan, apart, draws = calls[number].plan(), calls[number].apart(), calls[number].draws
        runs = -(-len(call.x) // calls[number].rows_per_sign) if apart else 0
        elements = runs * sum(math.prod(plan.extent(product)) for product in range(len(plan.products)))
        if _fits(call) and elements <= APART_ELEMENTS:
            tiles = engine.tiles(plan, torch.float32, call.precision, call.x.device)
            key = call.x.device, call.x.dtype, call.precision, update.dtype, draws, apart, tiles
            totals[key] = totals.get(key, 0) + elements
            together.setdefault((totals[key] // (gpu.APART_BYTES // 4), *key), []).append(number)
    groups = []
    for (*_, draws, apart, tiles), members in together.items():
        layout = Layout(engine, calls[members[0]].call, draws, apart)
        for number in members:
            layout.add_residual(calls[number])
        layout.finish(tiles)
        groups.append((members, layout))
    return groups


def _fits(call: Call) -> bool:
    return not gpu.is_plain(call.x) and not any(map(is_far, call[:3]))
