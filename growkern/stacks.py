"""Moments of several sites as one: padded with zeros to one size, so that one call solves all of them.

Zeros change nothing: a feature that is never seen is left out of every factor, and adds singular values of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from growkern.moments import Moments
from growkern.whitening import LARGEST_PADDED, padded, rounded

# Kept in their own dtype: they are read once, and a copy in float64 would cost more than that, and memory.
_AS_MEASURED = ("xx", "xv", "hh", "vv", "null", "null_h", "x_second")


@dataclass(frozen=True)
class Stack:
    """Moments of B sites, as in `Moments` with a leading dimension; `_AS_MEASURED` in their own dtype, else float64.

    Attributes
    ----------
    parts : list of Moments
        Those that are stacked.
    offsets, dtype : int, torch.dtype
        What all of them share; `dtype` is that of the sums.
    finite : Tensor
        (B,) whether all that was measured is.
    """

    parts: list[Moments]
    offsets: int
    dtype: torch.dtype
    finite: Tensor
    xx: Tensor
    xv: Tensor
    hh: Tensor
    hv: Tensor
    vv: Tensor
    xh: Tensor | None = None
    xr: Tensor | None = None
    null: Tensor | None = None
    null_h: Tensor | None = None
    x_mean: Tensor | None = None
    x_second: Tensor | None = None
    update: Tensor | None = None

    def numbers(self, values: Sequence[float]) -> Tensor:
        """Give one number for each site, (B,) in float64, to the device without waiting for it."""
        numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
        return numbers.pin_memory().to(self.xx.device, non_blocking=True) if self.xx.is_cuda else numbers

    @cached_property
    def apart(self) -> Tensor:
        """Features of x that are not the ones that h has too, (B, p)."""
        p, q = (self.numbers([len(getattr(each, name)) for each in self.parts])[:, None] - 1 for name in ("xx", "hh"))
        x_ones = self.xx.diagonal(dim1=1, dim2=2).gather(1, p.long()).double()
        h_ones = self.hh.diagonal(dim1=1, dim2=2).gather(1, q.long()).double()
        shared = self.numbers([each.x_bias and each.h_bias for each in self.parts]).bool()[:, None]
        shared = shared & torch.isclose(x_ones, h_ones, rtol=1e-6)
        return ~(shared & (torch.arange(self.xx.shape[1], device=self.xx.device) == p))


@dataclass(frozen=True)
class Solution:
    """Neurons of the B sites of a stack, before anyone has looked at them.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Padded fields of `NewNeurons`, with a leading dimension.
    facts : dict of str to Tensor
        Fields that are numbers, (B,).
    count, sound : Tensor
        (B,) units of each, the first of what the tensors hold; whether every factor served.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Tensor]
    count: Tensor
    sound: Tensor


def solve_together(
    moments: Mapping[str, Moments], key: Callable[[Moments], Hashable], run: Callable[[Stack, bool], Solution]
) -> dict[str, dict[str, Any]]:
    """Solve sites in stacks of like ones, by Cholesky first, and once more by eigenvectors where that did not serve.

    Parameters
    ----------
    moments : mapping of str to Moments
        Of the sites.
    key : callable
        What the sites of a stack have in common, besides what was measured.
    run : callable
        Solves a stack, by eigenvectors or not, without waiting for its device.

    Returns
    -------
    dict of str to dict
        By name of the site, the fields of `NewNeurons` that were solved for.

    Raises
    ------
    ValueError
        Where moments are not finite or no factor served.
    """
    found: dict[str, dict[str, Any]] = {}
    left = dict(moments)
    for by_eigenvectors in (False, True):
        together = groups(left, key)
        solutions, tables = [], []
        for names in together:
            stacked = stack([left[name] for name in names])  # as large as what was measured: one is held at a time
            solutions.append(run(stacked, by_eigenvectors))
            tables.append(_table(stacked, solutions[-1]))
            del stacked
        for names, solution, table in zip(together, solutions, _to_host(tables), strict=True):
            rows = zip(*(tensor.unbind() for tensor in solution.tensors.values()), strict=True)
            for name, row, column in zip(names, rows, table, strict=True):
                numbers = dict(zip(solution.facts, column[3:], strict=True))
                fields = _unstacked(left[name], dict(zip(solution.tensors, row, strict=True)), column[:3], numbers)
                found |= {} if fields is None else {name: fields}
        left = {name: each for name, each in left.items() if name not in found}
    if left:
        sites = ", ".join(repr(each.site.name) for each in left.values())
        raise ValueError(f"moments: the eigensolver did not converge on those of site {sites}")
    return found


def stack(parts: Sequence[Moments]) -> Stack:
    """Stack moments that `groups` has put together."""
    tensors = {name: padded([getattr(part, name) for part in parts]) for name in parts[0].tensors()}
    rows = [tensor.flatten(1) for tensor in tensors.values() if tensor.numel()]
    ends = [end(1) for each in rows for end in (each.amin, each.amax)]  # NaN is passed on; `aminmax` takes longer
    finite = torch.stack(ends).isfinite().all(0)
    wide = {name: tensor if name in _AS_MEASURED else tensor.double() for name, tensor in tensors.items()}
    return Stack(list(parts), parts[0].offsets, parts[0].vv.dtype, finite, **wide)


def groups(moments: Mapping[str, Moments], key: Callable[[Moments], Hashable]) -> list[list[str]]:
    """Names of sites that can be solved together: alike in `key`, in what was measured, and about in size."""
    found: dict[Hashable, list[str]] = {}
    for name, part in moments.items():
        tensors = part.tensors()
        sizes: Hashable = tuple(rounded(n) for n in (*part.xx.shape[:1], *part.hh.shape[:1], *part.vv.shape[:1]))
        if max(part.xx.shape[0], part.hh.shape[0], part.xv.shape[1]) > LARGEST_PADDED:
            sizes = name
        draws = 0 if part.null is None else len(part.null)
        kind = (tuple(tensors), draws, part.offsets, part.vv.dtype, part.vv.device)
        found.setdefault((sizes, kind, key(part)), []).append(name)
    return list(found.values())


def _table(m: Stack, solution: Solution) -> Tensor:
    """All that the host must know, (facts, B)."""
    return torch.stack([t.double() for t in (m.finite, solution.sound, solution.count, *solution.facts.values())])


def _to_host(tables: Sequence[Tensor]) -> list[list[list[float]]]:
    """Columns of each table (facts, B) as lists, in one transfer where facts are as many."""
    wide = [table.mT for table in tables]
    flat = torch.cat([table.flatten().to(wide[0].device) for table in wide]).tolist() if wide else []
    out, start = [], 0
    for table in wide:
        rows, columns = table.shape
        out.append([flat[start + row * columns : start + (row + 1) * columns] for row in range(rows)])
        start += rows * columns
    return out


def _unstacked(
    moments: Moments, tensors: Mapping[str, Tensor], column: Sequence[float], numbers: Mapping[str, float]
) -> dict[str, Any] | None:
    """Fields of one site without padding; None if its moments have no such factors."""
    finite, sound, count = column
    if not finite:
        names = [name for name, tensor in moments.tensors().items() if not tensor.isfinite().all()]
        raise ValueError(f"moments: {', '.join(names)} of site {moments.site.name!r} is not finite")
    if not sound:
        return None
    (p, t), (q, r), k = moments.xv.shape, moments.hv.shape, int(count)
    sizes = {"alpha": (k, p), "omega": (t, k), "singular_values": (k,), "best_update": (r, q)}
    sizes |= {"mean": (k,), "variance": (k,)}
    fields: dict[str, Any] = {"mean": None, "variance": None, "noise": None, "cut": 0}
    for name, part in tensors.items():
        for dim, size in enumerate(sizes[name]):
            part = part if part.shape[dim] == size else part.narrow(dim, 0, size)
        fields[name] = part.clone(memory_format=torch.contiguous_format)
    fields |= numbers
    return fields | {name: int(fields[name]) for name in ("rank", "cut")}
