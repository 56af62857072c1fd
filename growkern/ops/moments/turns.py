"""How long the splits of products are: a launch should end on all multiprocessors at about the same time."""

import heapq

import numpy as np

SHORTEST = 256  # positions that one program should sum at least, and about what it costs to start and end
STEP = 64  # of the positions of a split
TURNS = 4  # of programs on a multiprocessor, at most, as far as there is a choice


def lengths_of(
    positions: np.ndarray, programs: np.ndarray, sizes: np.ndarray, cut: np.ndarray, places: np.ndarray, most: int
) -> np.ndarray:
    """Choose the positions of a split of every product, the same for all that are launched together.

    Parameters
    ----------
    positions, programs, sizes : array, shape (products,)
        Positions that each sums, programs that it takes for all of them, and elements of its sum.
    cut : array, shape (products, ·)
        Products of one launch have equal rows.
    places : array, shape (products,)
        Programs of its kind that the device holds at a time.
    most : int
        Elements that the sums of splits may take.

    Returns
    -------
    array, shape (products,)
        Of each launch, the length with which the last program ends first.
    """
    lengths, whole = np.empty_like(positions), max(1, int(programs @ positions))
    for kind in np.unique(cut, axis=0):
        alike = (cut == kind).all(1)
        each, count, elements, room = positions[alike], programs[alike], sizes[alike], max(1, int(places[alike][0]))
        longest, work = max(1, int(each.max())), max(1, int(count @ each))
        ends = {}
        for parts in range(1, max(1, min(longest // SHORTEST, TURNS * room * longest // work)) + 1):
            length = -(-longest // parts // STEP) * STEP
            splits = -(-each // length)
            if parts == 1 or (elements * splits)[splits > 1].sum() <= most * work / whole:
                ends[length] = _end(each, count, length, room)
        lengths[alike] = min(ends, key=lambda length: ends[length])
    return lengths


def _end(positions: np.ndarray, programs: np.ndarray, length: int, places: int) -> int:
    """Positions until the last program is done, if the longest go first and each takes the place that is free next."""
    turns, more = divmod(int(programs @ (positions // length)), places)
    busy = [turns * (length + SHORTEST)] * (places - more) + [(turns + 1) * (length + SHORTEST)] * more
    rest = positions % length
    for taken in np.sort(np.repeat(rest, np.where(rest > 0, programs, 0)))[::-1].tolist():
        heapq.heapreplace(busy, busy[0] + taken + SHORTEST)
    return max(busy)
