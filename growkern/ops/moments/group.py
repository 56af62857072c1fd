"""The moments of several sites in one launch of each kernel: which of them go together, and what is known of them."""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from growkern.backend import register
from growkern.ops.moments import gpu
from growkern.ops.moments.calls import Call, Residual, Six, Three
from growkern.ops.moments.layout import Layout
from growkern.ops.moments.plan import Plan
from growkern.ops.moments.rows import is_far

SITE_ELEMENTS = 4 * 2**20  # that the sums of a site may take which is not summed alone
KEPT = 256  # groups of sites whose layouts are kept

Groups = list[tuple[list[int], Layout]]  # the numbers of the calls that are summed together, and how

_kept: dict[Hashable, Groups] = {}  # what was used last comes last


def grouped_moments(engine: gpu.Engine, calls: Sequence[Call]) -> list[Six]:
    """Sum the moments of several sites: those of one dtype and about one width in one launch of each kernel."""
    return _run(engine, calls, _moments, gpu.moments)


def grouped_residuals(engine: gpu.Engine, calls: Sequence[Residual]) -> list[Three]:
    """Sum the products with v⊥ of several sites: those cut alike, with as many draws, in one launch of each kernel."""
    return _run(engine, calls, _residuals, gpu.residual)


def serve(engine: gpu.Engine, backend: str) -> None:
    """Register the ops and groups with the kernels of an engine as those of a backend."""
    alone = gpu.linear_moments, gpu.linear_residual, gpu.conv2d_moments, gpu.conv2d_residual
    for op in (*alone, grouped_moments, grouped_residuals):
        register(op.__name__, backend)(functools.partial(op, engine))


def forget() -> None:
    """Drop all layouts, as those whose tiles are no longer the ones to choose."""
    _kept.clear()


def _run(
    engine: gpu.Engine,
    calls: Sequence[Any],
    planned: Callable[[gpu.Engine, Sequence[Any]], Groups],
    alone: Callable[[gpu.Engine, Any], Any],
) -> list[Any]:
    """Sum on each device what belongs together there, and every other site alone."""
    of_device: dict[torch.device, list[int]] = {}
    for number, call in enumerate(calls):
        of_device.setdefault(call.x.device, []).append(number)
    results: list[Any] = [None] * len(calls)
    for numbers in of_device.values():
        here = [calls[number] for number in numbers]
        with torch.cuda.device_of(here[0].x):
            for number, found in zip(numbers, _run_here(engine, here, planned, alone), strict=True):
                results[number] = found
    return results


def _run_here(
    engine: gpu.Engine,
    calls: Sequence[Any],
    planned: Callable[[gpu.Engine, Sequence[Any]], Groups],
    alone: Callable[[gpu.Engine, Any], Any],
) -> list[Any]:
    """Sum calls of the current device: those that belong together by kept layouts, every other one alone."""
    if gpu.is_capturing(calls[0].x.device):  # addresses would come from memory that is not kept
        _check(calls)
        return [alone(engine, call) for call in calls]
    key = engine, planned, tuple([call.facts() for call in calls])
    try:
        groups = _kept.pop(key, None)
    except TypeError:  # a list is no key, and no argument either, as the check will say
        groups = None
    if groups is None:  # what is known was checked
        _check(calls)
        groups = planned(engine, calls)
    _kept[key] = groups
    if len(_kept) > KEPT:
        del _kept[next(iter(_kept))]
    results: list[Any] = [None] * len(calls)
    for members, layout in groups:
        for number, found in zip(members, layout.run([calls[each].tensors() for each in members]), strict=True):
            results[number] = found
    return [alone(engine, call) if found is None else found for call, found in zip(calls, results, strict=True)]


def _check(calls: Sequence[Any]) -> None:
    for call in calls:
        call.check()


def _moments(engine: gpu.Engine, calls: Sequence[Call]) -> Groups:
    sites = []
    for number, call in enumerate(calls):
        if _fits(call):
            plan = call.plan()
            tiles = engine.tiles(plan, call.x.dtype, call.precision, call.x.device)
            sites.append((number, _slots(plan), (call.x.dtype, call.precision, tiles)))
    groups = []
    for (*_, tiles), members in _together(sites):
        layout = Layout(engine, calls[members[0]])
        for number in members:
            layout.add_moments(calls[number])
        layout.finish(tiles)
        groups.append((members, layout))
    return groups


def _residuals(engine: gpu.Engine, calls: Sequence[Residual]) -> Groups:
    sites = []
    for number, residual in enumerate(calls):
        call, update, *_ = residual
        if _fits(call):
            plan, apart, draws = residual.plan(), residual.apart(), residual.draws
            runs = -(-len(call.x) // residual.rows_per_sign) if apart else 0
            tiles = engine.tiles(plan, torch.float32, call.precision, call.x.device)
            cut = tiles, engine.subtract_tile(call.v.shape[1])
            kind = call.x.dtype, call.precision, update.dtype, cut, draws, apart
            sites.append((number, (1 + draws + runs) * _slots(plan), kind))
    groups = []
    for (*_, (tiles, _), draws, apart), members in _together(sites):
        layout = Layout(engine, calls[members[0]].call, draws, apart)
        for number in members:
            layout.add_residual(calls[number])
        layout.finish(tiles)
        groups.append((members, layout))
    return groups


def _together(sites: Iterable[tuple[int, int, tuple[Any, ...]]]) -> list[tuple[tuple[Any, ...], list[int]]]:
    """Gather the numbers of sites of one kind, as long as their sums do not take too many elements."""
    found: dict[tuple[Any, ...], list[int]] = {}
    totals: dict[tuple[Any, ...], int] = {}
    for number, elements, kind in sites:
        if elements <= SITE_ELEMENTS:
            totals[kind] = totals.get(kind, 0) + elements
            found.setdefault((totals[kind] // (gpu.APART_BYTES // 4), kind), []).append(number)
    return [(kind, members) for (_, kind), members in found.items()]


def _slots(plan: Plan) -> int:
    return sum(math.prod(plan.extent(product)) for product in range(len(plan.products)))


def _fits(call: Call) -> bool:
    return not gpu.is_plain(call.x) and not any(map(is_far, call[:3]))
