"""A plan laid out for a launch: tables on the device that tell every program its tile and its positions."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from growkern.ops.moments.plan import ONES, Piece, Plan, Product
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
    extents = np.array([plan.extent(p) for plan in plans for p in range(len(plan.products))], np.int64).reshape(-1, 2)
    bundles = _bundled(plans, tiles.shifts)
    owners = [(each.owner, each.product) for each in bundles]
    count, times = len(owners), 1 if runs else draws  # that a product is summed
    areas = np.array([p.rows.length * p.columns.length for _, p in owners], np.int64)
    sizes, positions = extents.prod(1), areas * np.array([images[i] for i, _ in owners], np.int64)
    # The sums of one bundle follow each other.
    order = np.lexsort(np.array([(each.place, each.first) for each in bundles], np.int64).reshape(-1, 2).T)
    slots, offsets = int(sizes.sum()), np.empty(count, np.int64)
    offsets[order] = np.cumsum(sizes[order]) - sizes[order]
    square = tiles.block_m == tiles.block_n  # then a symmetric product needs no tiles below the diagonal
    symmetric = np.array([square and p.u == p.v and _same(p.rows) and _same(p.columns) for _, p in owners], bool)
    blocks = _blocks(extents, positions, tiles)
    grid = [
        np.empty((0, 2), np.int64) if each.place else _grid(extents[i], symmetric[i], blocks[i])
        for i, each in enumerate(bundles)
    ]
    if runs:
        lengths = areas * np.array([runs[i] for i, _ in owners], np.int64)
        splits = -(-positions // np.maximum(1, lengths))
        apart = np.ones(count, bool)
    else:
        cut = np.column_stack([blocks, [each.shifts for each in bundles]])
        asked = np.array([len(each) for each in grid], np.int64) * draws
        groups = np.array([_warps(tiles, int(m * n)) for m, n in blocks], np.int64)
        places = processors * tiles.programs * tiles.warps // groups
        lengths = lengths_of(positions, asked, sizes * draws, cut, places, most)
        splits = np.maximum(1, -(-positions // lengths))
        apart = splits > 1
    partial = np.where(apart, splits * sizes, 0)
    spare = int(partial.sum())
    starts = np.empty(count, np.int64)
    starts[order] = np.cumsum(partial[order]) - partial[order]
    targets = np.where(apart, slots * draws + starts, offsets)
    rows, items, sums = [], [], []
    for draw in range(times):
        for number, (owner, product) in enumerate(owners):
            target = int(targets[number]) + draw * (spare if apart[number] else slots)
            where = product.rows.length * product.columns.length, product.columns.length
            sums_of = lengths[number], target, sizes[number]
            plan, before = plans[owner], owner * len(plans[owner].channels)
            walks = _walk(product, plan.sizes[product.u], 0) + _walk(product, plan.sizes[product.v], 1)
            sources = before + product.u, before + product.v
            shifting = product.columns.v, plan.sizes[product.v][1], partial[number] if apart[number] else sizes[number]
            rows.append((*sources, *extents[number], *where, *sums_of, *walks, draw, symmetric[number], *shifting))
            table = np.empty((splits[number], len(grid[number]), 4), np.int32)
            table[..., 0] = draw * count + number
            table[..., 1:3] = grid[number]
            table[..., 3] = np.arange(splits[number])[:, None]
            items.append(table.reshape(-1, 4))
            if apart[number]:
                chunks = np.arange(-(-sizes[number] // (COMBINE_BLOCK if runs else SUM_BLOCK)))
                task = np.empty((len(chunks), 6), np.int64)
                task[:, :4] = target, offsets[number] + draw * slots, sizes[number], splits[number]
                task[:, 4], task[:, 5] = chunks, owner
                sums.append(task)
    tables = _joined(items, 4, np.int32)
    products = tables[:, 0] % max(1, count)
    shifts = np.array([each.shifts for each in bundles], np.int64)
    kinds = np.column_stack([np.column_stack([blocks, shifts])[products], tables[:, 0] >= count])
    # Programs that run at the same time should read the same positions; the short ones fill the gaps at the end.
    taken = np.minimum(lengths[products], positions[products] - tables[:, 3] * lengths[products])
    ordered = np.lexsort((tables[:, 3], -taken, *kinds.T[::-1]))
    tables, kinds = tables[ordered], kinds[ordered]
    *assembly, programs = _assembly(plans, offsets, extents)
    arrays = (np.array(rows, np.int64).reshape(-1, FIELDS), tables, _joined(sums, 6, np.int64), *assembly)
    elements = slots * draws + spare * times
    names = "products", "items", "sums", "regions", "starts", "terms", "weights"
    uploaded = dict(zip(names, _uploaded(arrays, device), strict=True))
    launches, start = [], 0
    for (block_m, block_n, shifted, signed), length in zip(*np.unique(kinds, axis=0, return_counts=True), strict=True):
        warps = _warps(tiles, int(block_m * block_n))
        part = uploaded["items"][start : start + int(length)]
        launches.append(Launch(int(block_m), int(block_n), int(shifted), bool(signed), warps, part))
        start += int(length)
    return Schedule(
        **uploaded,
        launches=tuple(launches),
        slots=slots,
        draws=draws,
        elements=elements,
        tiles=tiles,
        programs=programs,
    )


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


def _same(piece: Piece) -> bool:
    return piece.u == piece.v and piece.u_step == piece.v_step


class _Line(NamedTuple):
    """A product of a plan, and what it is summed with: the first of its bundle, its place there, how many they are."""

    owner: int
    product: Product
    first: int
    place: int = 0
    shifts: int = 1


def _bundled(plans: tuple[Plan, ...], shifts: int) -> list[_Line]:
    """Find whole lines that differ by one pixel, to be summed `shifts` at a time over the columns of all of them."""
    found, first = [], 0
    for owner, plan in enumerate(plans):
        bundles = {number: _Line(owner, product, first + number) for number, product in enumerate(plan.products)}
        lines: dict[tuple[int, int, Piece], dict[int, int]] = {}
        for number, (u, v, rows, columns) in enumerate(plan.products if shifts > 1 else ()):
            by, (u_length, v_length) = columns.v - columns.u, (plan.sizes[side][1] for side in (u, v))
            start, end = max(0, -by), min(u_length, v_length - by)
            whole = columns == Piece(start, start + by, 1, 1, end - start)
            if whole and ONES not in (u, v) and not (u == v and _same(rows) and not by):
                lines.setdefault((u, v, rows), {})[by] = number
        for (u, v, rows), numbers in lines.items():
            for by in sorted(numbers):
                if all(by + i in numbers for i in range(shifts)):
                    members = [numbers.pop(by + i) for i in range(shifts)]
                    start = max(0, -by - shifts + 1)
                    end = min(plan.sizes[u][1], plan.sizes[v][1] - by)
                    union = Product(u, v, rows, Piece(start, start + by, 1, 1, end - start))
                    leader = first + members[0]
                    bundles |= {each: _Line(owner, union, leader, i, shifts) for i, each in enumerate(members)}
        found += [bundles[number] for number in range(len(plan.products))]
        first += len(plan.products)
    return found


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
