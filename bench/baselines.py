"""The second moments in PyTorch: as users write them, and in every faster way that we know. All give what the op gives.

Every function takes the arguments of its op. Matrix products run in the precision that the process allows.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from growkern.backend import use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments.plan import ONES, Piece, Plan, Product, conv2d_plan, residual_plan

Results = list[Tensor]


def with_ones(rows: Tensor, bias: bool) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if bias else rows


# Matrices ---------------------------------------------------------------------------------------------------


def six_products(x: Tensor, h: Tensor, v: Tensor, *, x_bias: bool, h_bias: bool) -> Results:
    x, h = with_ones(x, x_bias), with_ones(h, h_bias)
    return [torch.mm(a.T, b) for a, b in ((x, x), (x, h), (x, v), (h, h), (h, v), (v, v))]


def one_product(x: Tensor, h: Tensor, v: Tensor, *, x_bias: bool, h_bias: bool) -> Results:
    """Everything side by side, times itself."""
    ones = x.new_ones(len(x), 1)
    z = torch.cat([x, *[ones] * x_bias, h, *[ones] * h_bias, v], 1)
    p, q = x.shape[1] + x_bias, h.shape[1] + h_bias
    xs, hs, vs = slice(p), slice(p, p + q), slice(p + q, None)
    joint = torch.mm(z.T, z)
    return [joint[a, b] for a, b in ((xs, xs), (xs, hs), (xs, vs), (hs, hs), (hs, vs), (vs, vs))]


def draw_by_draw(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    *,
    signs: Tensor,
    rows_per_sign: int,
    x_bias: bool,
    h_bias: bool,
) -> Results:
    x, h = with_ones(x, x_bias), with_ones(h, h_bias)
    residual = v - h @ update.to(v.dtype).T
    signs = signs.to(v.dtype).repeat_interleave(rows_per_sign, 1)[:, : len(x)]
    signed = [residual * s[:, None] for s in signs]
    return [
        x.T @ residual,
        torch.stack([x.T @ each for each in signed]),
        torch.stack([h.T @ each for each in signed]),
    ]


def all_draws(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    *,
    signs: Tensor,
    rows_per_sign: int,
    x_bias: bool,
    h_bias: bool,
) -> Results:
    """Draws side by side, as one right-hand side for x and h together; runs of rows as a batch, added up under them."""
    p, r = x.shape[1] + x_bias, v.shape[1]
    h = with_ones(h, h_bias)
    residual, signs = v - h @ update.to(v.dtype).T, signs.to(v.dtype)
    left = torch.cat([with_ones(x, x_bias), h], 1)
    if rows_per_sign > 1:
        short = -len(left) % rows_per_sign
        runs = [F.pad(side, (0, 0, 0, short)).unflatten(0, (-1, rows_per_sign)) for side in (left, residual)]
        sums = torch.bmm(runs[0].mT, runs[1])  # (runs, p + q, r)
        nulls = (signs @ sums.flatten(1)).unflatten(1, sums.shape[1:])
        return [sums[:, :p].sum(0), nulls[:, :p], nulls[:, p:]]
    right = torch.cat([residual[:, None], signs.T[:, :, None] * residual[:, None]], 1).flatten(1)
    joint = (left.T @ right).unflatten(1, (-1, r)).transpose(0, 1)  # (1 + draws, p + q, r)
    return [joint[0, :p], joint[1:, :p], joint[1:, p:]]


# Maps, by patches -------------------------------------------------------------------------------------------


def flat(patches: Tensor) -> Tensor:
    """(images, features, positions) → (features, images·positions)."""
    return patches.transpose(0, 1).flatten(1)


def unfold(maps: Tensor, g: ConvGeometry, bias: bool = False) -> Tensor:
    patches = F.unfold(maps, g.kernel_size, g.dilation, g.padding, g.stride)
    return torch.cat([patches, torch.ones_like(patches[:, :1])], 1) if bias else patches


def moved(v: Tensor, g: ConvGeometry, hidden: torch.Size) -> Tensor:
    """v at the hidden positions that each tap reads, (images, r·taps, positions)."""
    (kh, kw), (sh, sw) = g.kernel_size, g.stride
    spread = v.new_zeros(*v.shape[:2], (v.shape[2] - 1) * sh + 1, (v.shape[3] - 1) * sw + 1)
    spread[..., ::sh, ::sw] = v
    before = [g.span(axis) - 1 - g.padding[axis] for axis in (0, 1)]
    after = [hidden[axis] + g.span(axis) - 1 - before[axis] - spread.shape[2 + axis] for axis in (0, 1)]
    windows = F.unfold(F.pad(spread, (before[1], after[1], before[0], after[0])), g.kernel_size, g.dilation)
    return windows.unflatten(1, (-1, kh * kw)).flip(2).flatten(1, 2)


def counts(v: Tensor, g: ConvGeometry, hidden: torch.Size) -> Tensor:
    """How often the consumer reads each hidden position."""
    return moved(v.new_ones(1, 1, *v.shape[2:]), g, hidden).sum(1).flatten()


def at_centres(patches: Tensor, g: ConvGeometry, hidden: torch.Size, outputs: torch.Size) -> Tensor:
    """Patches at the hidden positions that the centre tap reads, zero outside of the map."""
    axes = [
        torch.arange(outputs[i], device=patches.device) * g.stride[i]
        + g.dilation[i] * (g.kernel_size[i] // 2)
        - g.padding[i]
        for i in (0, 1)
    ]
    if all(torch.equal(axis, torch.arange(n, device=axis.device)) for axis, n in zip(axes, hidden, strict=True)):
        return patches
    inside = [(axis >= 0) & (axis < n) for axis, n in zip(axes, hidden, strict=True)]
    rows, columns = (axis.clamp(0, n - 1) for axis, n in zip(axes, hidden, strict=True))
    read = patches[..., (rows[:, None] * hidden[1] + columns).flatten()]
    return read * (inside[0][:, None] & inside[1]).flatten()


def by_unfold(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    *,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    kernel: str,
    x_bias: bool,
    h_bias: bool,
) -> Results:
    hidden, outputs = h.shape[2:], v.shape[2:]
    patches = unfold(x, producer, x_bias)
    hs, vs = flat(unfold(h, consumer, h_bias)), flat(v.flatten(2))
    if kernel == "center":
        xs = flat(at_centres(patches, consumer, hidden, outputs))
        return [xs @ xs.T, xs @ hs.T, xs @ vs.T, hs @ hs.T, hs @ vs.T, vs @ vs.T]
    xs = flat(patches)
    xx = flat(patches * counts(v, consumer, hidden)) @ xs.T
    xv = xs @ flat(moved(v, consumer, hidden)).T
    return [xx, xx.new_empty(len(xx), 0), xv, hs @ hs.T, hs @ vs.T, vs @ vs.T]


def residual_maps(h: Tensor, v: Tensor, update: Tensor, consumer: ConvGeometry, h_bias: bool) -> Tensor:
    q = h.shape[1] * consumer.taps
    weight = update[:, :q].to(h.dtype).unflatten(1, (h.shape[1], *consumer.kernel_size))
    bias = update[:, q].to(h.dtype) if h_bias else None
    return v - F.conv2d(h, weight, bias, consumer.stride, consumer.padding, consumer.dilation)


def residual_by_unfold(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    update: Tensor,
    *,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    kernel: str,
    signs: Tensor,
    x_bias: bool,
    h_bias: bool,
    per_image: bool = False,
) -> Results:
    """Draw by draw, or with `per_image` the sums of single images once, added up under all draws."""
    hidden, outputs = h.shape[2:], v.shape[2:]
    residual = residual_maps(h, v, update, consumer, h_bias)
    left = [unfold(x, producer, x_bias)]
    if kernel == "center":
        left = [at_centres(left[0], consumer, hidden, outputs), unfold(h, consumer, h_bias)]
        right = residual.flatten(2)
    else:
        right = moved(residual, consumer, hidden)
    signs = signs.to(v.dtype)
    if per_image:
        sums = [torch.bmm(each, right.mT) for each in left]
        nulls = [(signs @ each.flatten(1)).unflatten(1, each.shape[1:]) for each in sums]
        xr = sums[0].sum(0)
    else:
        sides = [flat(each) for each in left]
        signed = [flat(right * s[:, None, None]).T for s in signs]
        nulls = [torch.stack([side @ each for each in signed]) for side in sides]
        xr = sides[0] @ flat(right).T
    return [xr, *nulls] if kernel == "center" else [xr, nulls[0], v.new_empty(len(signs), 0, v.shape[1])]


# Maps, by shifts --------------------------------------------------------------------------------------------


def cut(piece: Piece, side: int) -> slice:
    start, step = piece[side], piece[2 + side]
    return slice(start, start + (piece.length - 1) * step + 1, max(step, 1))


class Shifts:
    """Correlations of maps over rectangles of positions, as growkern's plan asks for them.

    Those over most of a map differ by a shift only. All shifts of two maps are one gradient of the weights of a
    convolution whose kernel is as wide as they reach; or each is one product of a padded buffer with itself shifted.
    """

    def __init__(self, maps: tuple[Tensor, ...], plan: Plan, engine: str) -> None:
        self.maps, self.plan = maps, plan
        self.images = [m.permute(0, 2, 3, 1).contiguous() for m in maps]  # (images, rows, columns, channels)
        self.totals = [m.sum(0) for m in self.images]
        self.sums = dict.fromkeys(plan.products, maps[0].new_empty(0))
        wide: dict[tuple[int, int], list[Product]] = defaultdict(list)
        for p in plan.products:
            if self.is_wide(p):
                wide[p.u, p.v].append(p)
            else:
                self.sums[p] = self.strip(p)
        for sides, products in wide.items():
            (self.by_gradient if engine == "gradient" else self.by_products)(*sides, products)

    def is_wide(self, p: Product) -> bool:
        """Whether a product takes every pair of positions at its distance."""
        if ONES in (p.u, p.v):
            return False
        for axis, piece in enumerate((p.rows, p.columns)):
            n, m = self.maps[p.u].shape[2 + axis], self.maps[p.v].shape[2 + axis]
            shift = piece.v - piece.u
            first, last = max(0, -shift), min(n, m - shift)
            if (piece.u, piece.length) != (first, last - first) or (piece.length > 1 and piece.u_step != 1):
                return False
        return p.rows.v_step == p.rows.u_step and p.columns.v_step == p.columns.u_step

    def strip(self, p: Product) -> Tensor:
        if p.u == ONES and p.v == ONES:
            return self.maps[0].new_full((1, 1), len(self.maps[0]) * p.rows.length * p.columns.length)
        if ONES in (p.u, p.v):
            side = int(p.u == ONES)
            sums = self.totals[p[side]][cut(p.rows, side), cut(p.columns, side)].sum((0, 1))
            return sums[:, None] if p.v == ONES else sums[None]
        u, v = (self.images[p[side]][:, cut(p.rows, side), cut(p.columns, side)].flatten(0, 2) for side in (0, 1))
        return u.T @ v

    def by_gradient(self, first: int, second: int, products: list[Product]) -> None:
        u, v = self.maps[first], self.maps[second]
        shifts = [[piece.v - piece.u for piece in (p.rows, p.columns)] for p in products]
        low, high = ([end(axis) for axis in zip(*shifts, strict=True)] for end in (min, max))
        pads = [(-low[i], u.shape[2 + i] - v.shape[2 + i] + high[i]) for i in (0, 1)]
        size = (u.shape[1], v.shape[1], *(high[i] - low[i] + 1 for i in (0, 1)))
        sums = torch.nn.grad.conv2d_weight(F.pad(v, (*pads[1], *pads[0])), size, u)
        for p, shift in zip(products, shifts, strict=True):
            self.sums[p] = sums[:, :, shift[0] - low[0], shift[1] - low[1]]

    def by_products(self, first: int, second: int, products: list[Product]) -> None:
        reach = max(abs(piece.v - piece.u) for p in products for piece in (p.rows, p.columns))
        height, width = (max(self.maps[side].shape[2 + i] for side in (first, second)) + reach for i in (0, 1))
        u, v = (
            F.pad(m, (0, 0, 0, width - m.shape[2], 0, height - m.shape[1])).flatten(0, 2)
            for m in (self.images[first], self.images[second])
        )
        for p in products:
            shift = (p.rows.v - p.rows.u) * width + p.columns.v - p.columns.u
            self.sums[p] = u[max(0, -shift) : len(u) - max(0, shift)].T @ v[max(0, shift) : len(v) - max(0, -shift)]

    def results(self) -> Results:
        found = [self.maps[0].new_empty(shape) for shape in self.plan.shapes]
        for region, tables in zip(self.plan.regions, combinations(self.plan), strict=True):
            shape = (region.u_channels, region.v_channels)
            blocks = found[0].new_zeros(len(region.blocks), shape[0] * shape[1])
            for used, weights, transposed in tables:
                sums = torch.stack([self.sums[p].T if transposed else self.sums[p] for p in used])
                blocks += weights.to(sums) @ sums.flatten(1)
            grid = blocks.view(region.u_taps, region.v_taps, *shape).permute(2, 0, 3, 1).flatten(2).flatten(0, 1)
            rows, columns = region.first_row, region.first_column
            found[region.result][rows : rows + grid.shape[0], columns : columns + grid.shape[1]] = grid
        return found


@functools.cache
def combinations(plan: Plan) -> list[list[tuple[list[Product], Tensor, bool]]]:
    """For every region the products it takes, as they are and transposed, and their weights in each block."""
    tables: list[list[tuple[list[Product], Tensor, bool]]] = []
    for region in plan.regions:
        tables.append([])
        for transposed in (False, True):
            terms = [(i, t) for i, block in enumerate(region.blocks) for t in block if t.transposed == transposed]
            used = sorted({t.product for _, t in terms})
            weights = torch.zeros(len(region.blocks), len(used))
            for i, t in terms:
                weights[i, used.index(t.product)] += t.weight
            if used:
                tables[-1].append(([plan.products[n] for n in used], weights, transposed))
    return tables


def by_shifts(
    x: Tensor,
    h: Tensor,
    v: Tensor,
    *,
    producer: ConvGeometry,
    consumer: ConvGeometry,
    kernel: str,
    x_bias: bool,
    h_bias: bool,
    engine: str,
    make: Callable[..., Plan] = conv2d_plan,
) -> Results:
    """What is shared among taps once, by products or by gradients of convolution weights; growkern's own plan."""
    sizes = tuple((m.shape[2], m.shape[3]) for m in (x, h, v))
    channels = (x.shape[1], h.shape[1], v.shape[1])
    full = kernel == "full"
    found = Shifts((x, h, v), make(channels, sizes, producer, consumer, full, x_bias, h_bias), engine).results()
    return [found[0], found[0].new_empty(len(found[0]), 0), *found[1:]] if full else found


def residual_by_shifts(x: Tensor, h: Tensor, v: Tensor, update: Tensor, **named: Any) -> Tensor:
    """N alone, without draws."""
    residual = residual_maps(h, v, update, named["consumer"], named["h_bias"])
    return by_shifts(x, h, residual, make=residual_plan, **named)[0]


# All of them ---------------------------------------------------------------------------------------------------


def ways(
    case: Case, args: tuple[Tensor, ...], named: dict[str, Any], call: Callable[[], Any]
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """What people write first, then what is faster."""

    def reference() -> Any:
        with use_backend("reference"):
            return call()

    def bound(way: Callable[..., Any], **extra: Any) -> Callable[[], Any]:
        way = partial(from_half, way) if args[0].dtype == torch.float16 else way
        return partial(way, *args, **named, **extra)

    if case.op == "linear_moments":
        yield "six products", "users", bound(six_products)
        yield "one product", "pytorch", bound(one_product)
    elif case.op == "linear_residual":
        yield "draw by draw", "users", bound(draw_by_draw)
        yield "all draws", "pytorch", bound(all_draws)
    elif case.op == "conv2d_residual":
        yield "draw by draw", "users", bound(residual_by_unfold)
        yield "by image", "pytorch", bound(residual_by_unfold, per_image=True)
    else:
        yield "unfold", "users", bound(by_unfold)
        for engine in ("gradient", "products"):
            yield f"shifts by {engine}", "pytorch", bound(by_shifts, engine=engine)
    if "conv" in case.op:
        yield "chunks", "pytorch", reference


def from_half(way: Callable[..., Results], *args: Tensor, **named: Any) -> Results:
    """In single precision, as float16 holds no sum beyond 65,504; on a GPU tf32 multiplies its numbers exactly."""
    return way(*(each.float() for each in args), **named)
