"""How a GPU sums second moments: which correlations of maps, and how blocks of the results combine them.

Block (a, b) of a moment of patches is Σ_l ω(l) u(l + a) v(l + b)ᵀ over the samples l. Along each axis the pairs of
positions (l + a, l + b) lie on a line; two taps as far apart as two others walk the same line, with weights that
differ at a few positions near the borders. So along each axis a block is "the whole line times its common weight"
plus "these few positions times the difference", and the product of the two axes gives correlations over rectangles
of positions, which many blocks share. Nothing is padded, masked or unfolded.
"""

import functools
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from growkern.ops.moments.geometry import ConvGeometry

X, H, V, ONES = range(4)  # the sources of a product


class Window(NamedTuple):
    """Where taps read along one axis: tap t of sample l at (stride·l + offset + step·t) / divisor, if whole."""

    taps: int = 1
    stride: int = 1
    offset: int = 0
    step: int = 1
    divisor: int = 1


class Piece(NamedTuple):
    """Pairs of positions along one axis: (u + i·u_step, v + i·v_step) for i < length."""

    u: int
    v: int
    u_step: int
    v_step: int
    length: int


class Product(NamedTuple):
    """One correlation: Σ u vᵀ over all images and the pairs of positions of two pieces."""

    u: int
    v: int
    rows: Piece
    columns: Piece


class Term(NamedTuple):
    """A product in a block of a result."""

    product: int
    weight: float
    transposed: bool


class Region(NamedTuple):
    """Part of a result in which rows are (channel, tap) of u, columns (channel, tap) of v."""

    result: int
    first_row: int
    first_column: int
    u_channels: int
    u_taps: int
    v_channels: int
    v_taps: int
    blocks: tuple[tuple[Term, ...], ...]  # by tap of u, then tap of v


@dataclass(frozen=True)
class Source:
    """A map of the given size as one side of moments, with a virtual channel of ones or not."""

    index: int
    channels: int
    size: tuple[int, int]
    windows: tuple[Window, Window] = (Window(), Window())
    bias: bool = False

    @property
    def taps(self) -> int:
        """Number of positions that one sample reads."""
        return self.windows[0].taps * self.windows[1].taps

    @property
    def features(self) -> int:
        """Rows that this side gives a result."""
        return self.channels * self.taps + self.bias

    def parts(self) -> list["Source"]:
        """Split off the ones."""
        own = [Source(self.index, self.channels, self.size, self.windows)] if self.channels else []
        return own + [Source(ONES, 1, (1, 1), (Window(stride=0),) * 2)] * self.bias


@dataclass(eq=False)
class Plan:
    """The products of one call, and the regions of its results. Equal only to itself, so that it can be a key.

    Attributes
    ----------
    shapes : list of (int, int)
        Of the results.
    products : list of Product
        What is correlated.
    regions : list of Region
        How it is combined.
    channels : tuple of int
        Of the sources x, h, v and the ones.
    pixels : tuple of ((int, int), ...)
        Sizes of their maps.
    """

    channels: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    shapes: list[tuple[int, int]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    _numbers: dict[Product, int] = field(default_factory=dict)

    def extent(self, product: int) -> tuple[int, int]:
        """Give the shape of a product: channels of u, channels of v."""
        return self.channels[self.products[product].u], self.channels[self.products[product].v]

    def add(self, u: Source, v: Source, weights: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        """Append the result Σ_l ω(l) u_l v_lᵀ, ω(l) being the product of a weight of l's row and of its column."""
        result = len(self.shapes)
        self.shapes.append((u.features, v.features))
        mirrored = u == v
        row = 0
        for i, left in enumerate(u.parts()):
            column = 0
            for j, right in enumerate(v.parts()):
                if not (mirrored and j < i):
                    blocks = self._blocks(left, right, weights, mirrored and i == j)
                    extents = (left.channels, left.taps, right.channels, right.taps)
                    self.regions.append(Region(result, row, column, *extents, blocks))
                    if mirrored and j > i:
                        flipped = _transposed(blocks, left.taps, right.taps)
                        self.regions.append(Region(result, column, row, *extents[2:], *extents[:2], flipped))
                column += right.features
            row += left.features

    def _blocks(
        self, u: Source, v: Source, weights: tuple[tuple[int, ...], tuple[int, ...]], mirrored: bool
    ) -> tuple[tuple[Term, ...], ...]:
        """Terms of all blocks, in whichever of the ways to cut the axes costs least."""
        by_rows, by_columns = (
            [_axis(u, v, axis, weights[axis], shared) for shared in (False, True)] for axis in (0, 1)
        )
        pairs = [(a, b) for a, b in itertools.product(range(u.taps), range(v.taps)) if not (mirrored and b < a)]

        def products(rows: "_Axis", columns: "_Axis", a: int, b: int) -> list[tuple[Product, float]]:
            (ay, ax), (by, bx) = divmod(a, u.windows[1].taps), divmod(b, v.windows[1].taps)
            return [
                (Product(u.index, v.index, row, column), c * d)
                for c, row in rows[ay, by]
                for d, column in columns[ax, bx]
            ]

        def cost(way: tuple["_Axis", "_Axis"]) -> int:
            distinct = {product for a, b in pairs for product, _ in products(*way, a, b)}
            return sum(each.rows.length * each.columns.length + OVERHEAD for each in distinct)

        best = min(itertools.product(by_rows, by_columns), key=cost)
        blocks: dict[tuple[int, int], tuple[Term, ...]] = {}
        for a, b in pairs:
            blocks[a, b] = tuple(Term(self._number(p), weight, False) for p, weight in products(*best, a, b))
            if mirrored and a != b:
                blocks[b, a] = tuple(term._replace(transposed=True) for term in blocks[a, b])
        return tuple(blocks[pair] for pair in itertools.product(range(u.taps), range(v.taps)))

    def _number(self, product: Product) -> int:
        number = self._numbers.setdefault(product, len(self.products))
        if number == len(self.products):
            self.products.append(product)
        return number


OVERHEAD = 2  # of a product, in positions of an image

_Axis = dict[tuple[int, int], list[tuple[int, Piece]]]


def _transposed(blocks: tuple[tuple[Term, ...], ...], u_taps: int, v_taps: int) -> tuple[tuple[Term, ...], ...]:
    pairs = itertools.product(range(v_taps), range(u_taps))
    return tuple(tuple(t._replace(transposed=not t.transposed) for t in blocks[a * v_taps + b]) for b, a in pairs)


def _axis(u: Source, v: Source, axis: int, weights: tuple[int, ...], shared: bool) -> _Axis:
    """Weighted pieces of every pair of taps along one axis: whole lines with corrections, or each its own."""
    first, second = u.windows[axis], v.windows[axis]
    lengths = u.size[axis], v.size[axis]
    # Samples of one residue have steps without a remainder and, but for borders, one weight.
    period = max(first.divisor, second.divisor, _period(weights))
    pieces: _Axis = {}
    for a, b in itertools.product(range(first.taps), range(second.taps)):
        pieces[a, b] = []
        for residue in range(period):
            line = [
                (window.stride * residue + window.offset + window.step * tap, window.stride * period, window.divisor)
                for window, tap in ((first, a), (second, b))
            ]
            if all(start % divisor == 0 for start, _, divisor in line):
                (u_start, u_step), (v_start, v_step) = ((start // d, step // d) for start, step, d in line)
                run = weights[residue::period]
                pieces[a, b] += _cut((u_start, v_start), (u_step, v_step), lengths, run, shared)
    return pieces


def _cut(
    starts: tuple[int, int], steps: tuple[int, int], lengths: tuple[int, int], weights: tuple[int, ...], shared: bool
) -> list[tuple[int, Piece]]:
    """Cut the line of pairs start + i·step inside both maps into pieces of one weight, `weights` from i = 0 on."""
    if any(not step and not 0 <= start < length for start, step, length in zip(starts, steps, lengths, strict=True)):
        return []
    ends = [
        (-(start // step), (length - 1 - start) // step + 1)
        for start, step, length in zip(starts, steps, lengths, strict=True)
        if step
    ] or [(0, len(weights))]
    low, high = max(first for first, _ in ends), min(last for _, last in ends)
    found = [weights[i] if 0 <= i < len(weights) else 0 for i in range(low, high)]
    common = Counter(found).most_common(1)[0][0] if found and shared else 0
    runs = [(common, low, high)] if common else []
    position = low
    for weight, group in itertools.groupby(found):
        count = len(list(group))
        if weight != common:
            runs.append((weight - common, position, position + count))
        position += count
    pieces = []
    for weight, i, j in runs:
        first, second = (start + i * step for start, step in zip(starts, steps, strict=True))
        by_u, by_v = steps if j - i > 1 else (0, 0)
        pieces.append((weight, Piece(first, second, by_u, by_v, j - i)))
    return pieces


def _period(weights: tuple[int, ...]) -> int:
    """Smallest distance at which the weights repeat, borders aside."""
    inner = weights[len(weights) // 4 : len(weights) - len(weights) // 4]
    return next((p for p in range(1, len(inner) // 2 + 1) if inner[p:] == inner[:-p]), 1)


@functools.lru_cache(maxsize=256)
def linear_plan(channels: tuple[int, int, int], x_bias: bool, h_bias: bool) -> Plan:
    """Plan the six moments of matrices, which are maps of one position."""
    one = ConvGeometry(1)
    return conv2d_plan(channels, ((1, 1),) * 3, one, one, False, x_bias, h_bias)


@functools.lru_cache(maxsize=256)
def conv2d_plan(
    channels: tuple[int, int, int],
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    producer: ConvGeometry,
    consumer: ConvGeometry,
    full: bool,
    x_bias: bool,
    h_bias: bool,
) -> Plan:
    """Plan xx, xh, xv, hh, hv, vv; without xh for "full"."""
    x, h, v, target, ones, counts, inside = _sides(channels, sizes, producer, consumer, full, x_bias, h_bias)
    plan = Plan((*channels, 1), (*sizes, (1, 1)))
    plan.add(x, x, counts)
    if not full:
        plan.add(x, h, inside)
    plan.add(x, target, inside)
    plan.add(h, h, ones)
    plan.add(h, v, ones)
    plan.add(v, v, ones)
    return plan


@functools.lru_cache(maxsize=256)
def residual_plan(
    channels: tuple[int, int, int],
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    producer: ConvGeometry,
    consumer: ConvGeometry,
    full: bool,
    x_bias: bool,
    h_bias: bool,
) -> Plan:
    """Plan xr, and hr but for "full"; v⊥ takes the place of v."""
    x, h, v, target, ones, _, inside = _sides(channels, sizes, producer, consumer, full, x_bias, h_bias)
    plan = Plan((*channels, 1), (*sizes, (1, 1)))
    plan.add(x, target, inside)
    if not full:
        plan.add(h, v, ones)
    return plan


_Weights = tuple[tuple[int, ...], tuple[int, ...]]


def _sides(
    channels: tuple[int, int, int],
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    producer: ConvGeometry,
    consumer: ConvGeometry,
    full: bool,
    x_bias: bool,
    h_bias: bool,
) -> tuple[Source, Source, Source, Source, _Weights, _Weights, _Weights]:
    """Describe the sides x, h, v and the target of new neurons, and weigh the samples of h, of xx, of xv."""
    _, hidden, outputs = sizes
    x_windows, h_windows, targets, counts, inside = [], [], [], [], []
    for axis in (0, 1):
        reads = Window(
            consumer.kernel_size[axis], consumer.stride[axis], -consumer.padding[axis], consumer.dilation[axis]
        )
        h_windows.append(reads)
        made = (producer.kernel_size[axis], producer.stride[axis], -producer.padding[axis], producer.dilation[axis])
        if full:
            x_windows.append(Window(*made))
            # Tap t at output o reads hidden position i: o = (i + padding − dilation·t) / stride.
            targets.append(Window(reads.taps, 1, -reads.offset, -reads.step, reads.stride))
            read = Counter(
                reads.stride * o + reads.offset + reads.step * t
                for o, t in itertools.product(range(outputs[axis]), range(reads.taps))
            )
            counts.append(tuple(read[i] for i in range(hidden[axis])))
            inside.append((1,) * hidden[axis])
        else:
            centre = reads.offset + reads.step * (reads.taps // 2)
            x_windows.append(Window(made[0], made[1] * reads.stride, made[1] * centre + made[2], made[3]))
            targets.append(Window())
            inside.append(tuple(int(0 <= reads.stride * o + centre < hidden[axis]) for o in range(outputs[axis])))
            counts.append(inside[axis])
    x = Source(X, channels[0], sizes[0], (x_windows[0], x_windows[1]), x_bias)
    h = Source(H, channels[1], hidden, (h_windows[0], h_windows[1]), h_bias)
    v = Source(V, channels[2], outputs)
    target = Source(V, channels[2], outputs, (targets[0], targets[1]))
    ones = ((1,) * outputs[0], (1,) * outputs[1])
    return x, h, v, target, ones, (counts[0], counts[1]), (inside[0], inside[1])
