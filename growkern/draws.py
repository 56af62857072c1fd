"""Random signs: draws of what chance alone makes of N, from sums in which every sample takes part once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_LONGEST_RUN = 64  # of rows that share a random sign, but for those of one image or sequence
_SIGNS = 512  # at least, wherever rows are as many: strong directions then blur into chance by 1/√512 only
_WIDE, LEAST_DRAWS = 2**21, 8  # entries of N from which on draws are half as many, but for so many
_LONGER = 0.25  # by how much of a class a part may be longer, before it is cut once more
_FEW = 2**22  # entries of N times rows of a batch, up to which one call with more signs takes less than several calls
_ELEMENTS = 2**19  # of sums that are made draws at a time, in the cache


class Part(NamedTuple):
    """Samples that one call sums up: the first class, rows or images, signs (classes, runs), rows that share one."""

    number: int
    rows: slice
    signs: Tensor
    run: int


def joined_parts(parts: Iterable[Part]) -> list[Part]:
    """Join neighbours of the same classes, if runs end where the first one does."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if (
            last is not None
            and (last.number, last.run, len(last.signs)) == (part.number, part.run, len(part.signs))
            and (last.rows.stop - last.rows.start) % last.run == 0
        ):
            found[-1] = last._replace(
                rows=slice(last.rows.start, part.rows.stop), signs=torch.cat([last.signs, part.signs], 1)
            )
        else:
            found.append(part)
    return found


class Draws:
    """Sums over classes of one site's samples under random signs, and draws made of them.

    The samples of a measurement are divided, in order, into J classes of about the same size, J a power of two. Every
    image or run of rows i gets one random sign s_i, and Q_j is the sum over class j of s_i x_i v⊥_iᵀ. Draw d is
    Σ_j H_dj Q_j with a Hadamard matrix H of order J. The signs H_dj s_i of each draw are independent and uniform. Two
    draws are uncorrelated where classes are alike, as rows of H are orthogonal.

    Wide sites have half as many draws: these take the most memory of all, and calls become fewer and larger.

    Attributes
    ----------
    classes : int
        J.
    sums : dict of str to Tensor
        "null" and "null_h": Q_j of x and of h, (J, p, r·offsets) and (J, q, r), as far as they have been added up.
    """

    def __init__(self, draws: int, entries: int, count: int, seed: int) -> None:
        """Prepare for draws of N, which has so many entries, from `count` rows, or images, that come in batches."""
        self._draws = min(draws, max(draws // 2, LEAST_DRAWS)) if entries > _WIDE else draws
        self._entries = entries
        self._count, self._begun = count, 0
        self.classes = 1 << (self._draws - 1).bit_length()
        self.sums: dict[str, Tensor] = {}
        self._signs = torch.Generator("cpu").manual_seed(seed)

    def parts(self, rows: int, run: int) -> Iterator[Part]:
        """Cut the next batch into parts, each to be summed by one call.

        Where N is small a batch is one part, and signs are 0 in all classes but a sample's own.

        Parameters
        ----------
        rows, run : int
            Rows, or images, of the batch, and how many of them share a sign.

        Yields
        ------
        Part
            Rows are counted from the first one of the batch.
        """
        count, runs = max(self._count, 1), -(-rows // run)
        pieces = max(min(math.ceil(rows * self.classes / count - _LONGER), runs), 1)
        ends = [min(piece * runs // pieces * run, rows) for piece in range(pieces + 1)]
        pairs = list(itertools.pairwise(ends))
        owners = [(self._begun + (first + last) // 2) * self.classes // count for first, last in pairs]
        signs = torch.randint(0, 2, (1, runs), generator=self._signs, device="cpu") * 2.0 - 1
        self._begun += rows
        if rows * self._entries <= _FEW:
            own = signs.new_zeros(owners[-1] - owners[0] + 1, runs)
            for owner, (first, last) in zip(owners, pairs, strict=True):
                own[owner - owners[0], first // run : -(-last // run)] = 1
            yield Part(owners[0], slice(0, rows), signs * own, run)
            return
        for owner, (first, last) in zip(owners, pairs, strict=True):
            yield Part(owner, slice(first, last), signs[:, first // run : -(-last // run)].clone(), run)

    def places(self, number: int, null: Tensor, null_h: Tensor) -> list[Tensor]:
        """Give where to add the sums of as many classes, of which the first is known by its number."""
        for name, value in (("null", null), ("null_h", null_h)):
            if name not in self.sums:
                self.sums[name] = value.new_zeros(self.classes, *value.shape[1:])
        return [each[number : number + len(null)] for each in self.sums.values()]

    def made(self) -> dict[str, Tensor]:
        """Make the draws, (draws, p, r·offsets) and (draws, q, r), of the sums of all classes, in their memory."""
        for each in self.sums.values():
            transform(each)
        return {name: each[: self._draws] for name, each in self.sums.items()}


def transform(sums: Tensor) -> None:
    """Multiply the first dimension, a power of two, by a Hadamard matrix in place: H_dj = (−1)^(bits of d & j).

    Parameters
    ----------
    sums : Tensor
        (classes, …).
    """
    for columns in sums.flatten(1).split(max(_ELEMENTS // len(sums), 1), 1):
        half = 1
        while half < len(sums):
            even, odd = columns.unflatten(0, (-1, 2, half)).unbind(1)
            even += odd
            odd.mul_(-2).add_(even)
            half *= 2


def rows_per_sign(rows: int, batch_size: int, count: int) -> int:
    """Give how many consecutive rows share a random sign: those of one image or sequence, or of several at once.

    Parameters
    ----------
    rows, batch_size : int
        Of one batch: rows (or images) that a layer sees, and images or sequences that the model does.
    count : int
        Rows of all batches; where they abound, sequences share signs, and what the draws cost does not grow with them.
        0 where none are to share.

    Returns
    -------
    int
        At least 1.
    """
    if rows % batch_size:
        return _LONGEST_RUN
    own = max(rows // batch_size, 1)
    return own * max(1, min(_LONGEST_RUN // own, count // own // _SIGNS))
