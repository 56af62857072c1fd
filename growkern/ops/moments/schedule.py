"""A plan laid out for a launch: tables on the device that tell every program its tile and its positions."""

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from growkern.ops.moments.bundles import Line, bundled, is_same_walk
from growkern.ops.moments.plan import ONES, Plan, Product
from growkern.ops.moments.turns import lengths_of

FIELDS = 22  # of a product
REGION_FIELDS = 11
SUM_BLOCK = 1024  # elements of one program that adds up splits
COMBINE_BLOCK, COMBINE_DRAWS = 128, 32  # elements and draws of one that adds up runs under signs
ASSEMBLE_ROWS, ASSEMBLE_COLUMNS = 16, 128  # tile of a program that assembles results


class Tiles(NamedTuple):
    """How a kernel cuts products: channels of u and v, positions at a time, and what Triton asks for."""

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    programs: int = 3  # that a multiprocessor holds at a time
    shifts: int = 1  # of v along rows that a program multiplies with one tile of u, where there are as many


class Launch(NamedTuple):
    """The items of one launch, of tiles (block_m, block_n), for so many shifts of v at once, with signs or not."""

    block_m: int
    block_n: int
    shifts: int
    signed: bool
    warps: int
    items: Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of one launch.

    Attributes
    ----------
    products : Tensor, shape (products, FIELDS)
        int64: sources, extents, area, columns, positions of a split, where its sums go, how far apart splits are,
        base and steps by row, column and image of u, of v, number of the draw, whether symmetric, first column of v,
        columns of its map, and how far apart the sums of shifts are. How many images there are is told at the launch.
    items : Tensor, shape (programs, 4)
        int32: product, row and column of the tile, split.
    launches : tuple of Launch
        Which of the items are cut alike.
    sums : Tensor, shape (programs, 6)
        int64: first element of the splits, of their sum, elements, splits, chunk, plan.
    regions, starts, terms, weights : Tensor
        How to assemble: see `_assembly`.
    slots : int
        Elements of all products of one draw.
    draws : int
        How often there are slots.
    elements : int
        Of the workspace: the slots, then the splits.
    tiles : Tiles
        What it was cut for.
    programs : int
        That assemble.
    """

    products: Tensor
    items: Tensor
    launches: tuple[Launch, ...]
    sums: Tensor
    regions: Tensor
    starts: Tensor
    terms: Tensor
    weights: Tensor
    slots: int
    draws: int
    elements: int
    tiles: Tiles
    programs: int

    def slots_of(self, workspace: Tensor) -> Tensor:
        """View the slots, (draws, slots), in a workspace."""
        return workspace[: self.draws * self.slots].view(self.draws, self.slots)


def bucket(images: int) -> int:
    """Round a number of images up to five binary digits, so that batches of about one size share their tables."""
    unit = 1 << max(0, images.bit_length() - 5)
    return -(-images // unit) * unit


@functools.lru_cache(maxsize=512)
def schedule(
    plans: tuple[Plan, ...],
    images: tuple[int, ...],
    draws: int,
    runs: tuple[int, ...] | None,
    tiles: Tiles,
    processors: int,
    most: int,
    device: torch.device,
) -> Schedule:
    """Lay plans out for one launch.

    Parameters
    ----------
    plans : tuple of Plan
        What to correlate and how to combine it. The sources and results of the second follow those of the first.
    images : tuple of int
        Number of images, or rows of matrices, of each; a launch may have fewer.
    draws : int
        How often there are sums of every product, each time under another draw of signs.
    runs : tuple of int or None
        Images of each plan that share their signs: their sums are kept apart, to be combined under all draws. None:
        signs are multiplied in, and every product is summed anew for each draw.
    tiles : Tiles
        How to cut.
    processors : int
        Multiprocessors of the device.
    most : int
        Elements that splits may take, as far as there are several.
    device : torch.device
        Where the tables go.

    Returns
    -------
    Schedule
        The tables.
    """
    refuse_capture(device)
    lines = bundled(plans, tiles.shifts)
    extents = np.array([plan.extent(p) for plan in plans for p in range(len(plan.products))], np.int64).reshape(-1, 2)
    areas = np.array([p.rows.length * p.columns.length for _, p, *_ in lines], np.int64)
    sizes, positions = extents.prod(1), areas * np.array([images[line.owner] for line in lines], np.int64)
    square = tiles.block_m == tiles.block_n  # then a symmetric product needs no tiles below the diagonal
    symmetric = np.array(
        [square and p.u == p.v and is_same_walk(p.rows) and is_same_walk(p.columns) for _, p, *_ in lines], bool
    )
    blocks = _blocks(extents, positions, tiles)
    cuts = np.column_stack([blocks, np.array([line.shifts for line in lines], np.int64)])
    grids = [
        np.empty((0, 2), np.int64) if line.place else _grid(*each)
        for line, *each in zip(lines, extents, symmetric, blocks, strict=True)
    ]
    if runs:
        lengths = areas * np.array([runs[line.owner] for line in lines], np.int64)
        splits, apart = -(-positions // np.maximum(1, lengths)), np.ones(len(lines), bool)
    else:
        asked = np.array([len(grid) for grid in grids], np.int64) * draws
        groups = np.array([_warps(tiles, int(m * n)) for m, n in blocks], np.int64)
        places = processors * tiles.programs * tiles.warps // groups
        lengths = lengths_of(positions, asked, sizes * draws, cuts, places, most)
        splits = np.maximum(1, -(-positions // lengths))
        apart = splits > 1

    # The workspace: the slots of every draw, then what has to be added up to them.
    order = np.lexsort(np.array([(line.place, line.first) for line in lines], np.int64).reshape(-1, 2).T)
    partial = np.where(apart, splits * sizes, 0)
    slots, spare, times = int(sizes.sum()), int(partial.sum()), 1 if runs else draws  # that a product is summed
    offsets = _stacked(sizes, order)
    targets = np.where(apart, slots * draws + _stacked(partial, order), offsets)
    pitches = np.where(apart, partial, sizes)  # from the sums of one shift to those of the next
    rows, items, sums = [], [], []
    for draw, (number, line) in itertools.product(range(times), enumerate(lines)):
        target = int(targets[number]) + draw * (spare if apart[number] else slots)
        sums_of = lengths[number], target, sizes[number]
        rows.append(_product_row(line, plans, extents[number], sums_of, draw, symmetric[number], pitches[number]))
        items.append(_items(draw * len(lines) + number, grids[number], int(splits[number])))
        if apart[number]:
            chunks = np.arange(-(-sizes[number] // (COMBINE_BLOCK if runs else SUM_BLOCK)))
            task = np.empty((len(chunks), 6), np.int64)
            task[:, :4] = target, offsets[number] + draw * slots, sizes[number], splits[number]
            task[:, 4], task[:, 5] = chunks, line.owner
            sums.append(task)

    tables = _joined(items, 4, np.int32)
    products = tables[:, 0] % max(1, len(lines))
    kinds = np.column_stack([cuts[products], tables[:, 0] >= len(lines)])
    # Programs that run at the same time should read the same positions; the short ones fill the gaps at the end.
    taken = np.minimum(lengths[products], positions[products] - tables[:, 3] * lengths[products])
    ordered = np.lexsort((tables[:, 3], -taken, *kinds.T[::-1]))
    *assembly, programs = _assembly(plans, offsets, extents)
    arrays = (np.array(rows, np.int64).reshape(-1, FIELDS), tables[ordered], _joined(sums, 6, np.int64), *assembly)
    names = "products", "items", "sums", "regions", "starts", "terms", "weights"
    uploaded = dict(zip(names, _uploaded(arrays, device), strict=True))
    return Schedule(
        **uploaded,
        launches=_launches(uploaded["items"], kinds, tiles),
        slots=slots,
        draws=draws,
        elements=slots * draws + spare * times,
        tiles=tiles,
        programs=programs,
    )


def _stacked(sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Find the first element of each part, where parts of these sizes follow one another in an order."""
    starts = np.empty(len(sizes), np.int64)
    starts[order] = np.cumsum(sizes[order]) - sizes[order]
    return starts


def _product_row(
    line: Line,
    plans: tuple[Plan, ...],
    extent: np.ndarray,
    sums: tuple[int, int, int],
    draw: int,
    symmetric: bool,
    pitch: int,
) -> tuple[int, ...]:
    """Fill in a row of `Schedule.products`; `sums` are positions of a split, its target and its elements."""
    product, plan = line.product, plans[line.owner]
    before = line.owner * len(plan.channels)
    area = product.rows.length * product.columns.length
    walks = _walk(product, plan.sizes[product.u], 0) + _walk(product, plan.sizes[product.v], 1)
    shifting = product.columns.v, plan.sizes[product.v][1], pitch
    sources = before + product.u, before + product.v
    return (*sources, *extent, area, product.columns.length, *sums, *walks, draw, symmetric, *shifting)


def _items(number: int, grid: np.ndarray, splits: int) -> np.ndarray:
    """List for every program that sums a product its number, row and column of the tile, and split."""
    table = np.empty((splits, len(grid), 4), np.int32)
    table[..., 0] = number
    table[..., 1:3] = grid
    table[..., 3] = np.arange(splits)[:, None]
    return table.reshape(-1, 4)


def _launches(items: Tensor, kinds: np.ndarray, tiles: Tiles) -> tuple[Launch, ...]:
    """Cut items, sorted by their kinds (block_m, block_n, shifts, signed), into one launch for each kind."""
    launches, start = [], 0
    for (block_m, block_n, shifts, signed), count in zip(*np.unique(kinds, axis=0, return_counts=True), strict=True):
        part, warps = items[start : start + int(count)], _warps(tiles, int(block_m * block_n))
        launches.append(Launch(int(block_m), int(block_n), int(shifts), bool(signed), warps, part))
        start += int(count)
    return tuple(launches)


def _warps(tiles: Tiles, elements: int) -> int:
    """Warps of a program: narrow tiles have more operands for each sum, and so more of them."""
    return min(tiles.warps, max(1, 2 * tiles.warps * elements // (tiles.block_m * tiles.block_n)))


def _uploaded(arrays: tuple[np.ndarray, ...], device: torch.device) -> list[Tensor]:
    """Copy arrays to a device in one go, and wait for it: other streams than this one may read what is kept."""
    bounds = np.cumsum([0] + [-(-array.nbytes // 16) * 16 for array in arrays])
    host = np.zeros(bounds[-1], np.uint8)
    for array, start in zip(arrays, bounds, strict=False):
        host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    buffer = torch.from_numpy(host).to(device)
    return [
        buffer[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, bounds.tolist(), strict=False)
    ]


def refuse_capture(device: torch.device) -> None:
    """Raise a RuntimeError while a CUDA graph is captured: what stays must be made before, by a first call."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "moments: run once with these shapes before capturing a CUDA graph: tables are made then; "
            "for a group, call the ops of the sites one by one before capturing, as a graph measures them alone"
        )


def _blocks(extents: np.ndarray, positions: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Tile of every product: one side shrinks to 16 channels where that spares an eighth of all work or more."""
    whole = np.array([tiles.block_m, tiles.block_n])
    blocks = np.where(extents <= 16, np.minimum(16, whole), whole)

    def work(blocks: np.ndarray) -> float:
        return float(((-(-extents // blocks) * blocks).prod(1) * positions).sum())

    plain = np.broadcast_to(whole, extents.shape)
    return blocks if work(blocks) <= 7 / 8 * work(plain) else plain


def _grid(extents: np.ndarray, symmetric: bool, blocks: np.ndarray) -> np.ndarray:
    """Row and column of every tile; of a symmetric product only those on and above the diagonal."""
    across, down = -(-extents // blocks)
    tile = np.stack(np.meshgrid(np.arange(across), np.arange(down), indexing="ij"), -1).reshape(-1, 2)
    return tile[tile[:, 0] <= tile[:, 1]] if symmetric else tile


def _walk(product: Product, size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """First pixel of one side of a product, then steps by row, column and image; the ones are one pixel."""
    if product[side] == ONES:
        return 0, 0, 0, 0
    rows, columns, (height, width) = product.rows, product.columns, size
    return rows[side] * width + columns[side], rows[2 + side] * width, columns[2 + side], height * width


def _joined(tables: list[np.ndarray], width: int, dtype: type) -> np.ndarray:
    return np.concatenate(tables).astype(dtype) if tables else np.empty((0, width), dtype)


def _assembly(
    plans: tuple[Plan, ...], offsets: np.ndarray, extents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Tabulate how slots make results.

    Returns
    -------
    regions : array, shape (regions, REGION_FIELDS)
        First program, result, first element in it, its pitch, rows, taps of u, columns, taps of v, first block,
        most terms of a block, elements of the result.
    starts : array, shape (blocks + 1,)
        Block b has the terms starts[b] to starts[b + 1].
    terms : array, shape (terms, 3)
        Slot, and the steps by channel of u and of v in it.
    weights : array, shape (terms,)
        Of the terms.
    programs : int
        How many tiles there are.
    """
    regions, terms, weights, starts, first = [], [], [], [0], 0
    first_result = first_product = 0
    for plan in plans:
        for region in plan.regions:
            rows, pitch = plan.shapes[region.result]
            height, width = region.u_channels * region.u_taps, region.v_channels * region.v_taps
            corner = region.first_row * pitch + region.first_column
            most = max(map(len, region.blocks), default=0)
            taps = (height, region.u_taps, width, region.v_taps)
            regions.append(
                (first, first_result + region.result, corner, pitch, *taps, len(starts) - 1, most, rows * pitch)
            )
            first += -(-height // ASSEMBLE_ROWS) * -(-width // ASSEMBLE_COLUMNS)
            for block in region.blocks:
                for term in block:
                    product = first_product + term.product
                    steps = (int(extents[product][1]), 1)
                    terms.append((int(offsets[product]), *(steps[::-1] if term.transposed else steps)))
                    weights.append(term.weight)
                starts.append(len(terms))
        first_result += len(plan.shapes)
        first_product += len(plan.products)
    return (
        np.array(regions, np.int64).reshape(-1, REGION_FIELDS),
        np.array(starts, np.int32),
        np.array(terms, np.int64).reshape(-1, 3),
        np.array(weights, np.float32),
        first,
    )
