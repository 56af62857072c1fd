"""Which products of a plan are summed together: whole lines of positions that differ by a shift of one pixel."""

from typing import NamedTuple

from growkern.ops.moments.plan import ONES, Piece, Plan, Product


class Line(NamedTuple):
    """A product of a plan, and what it is summed with: the first of its bundle, its place there, how many they are."""

    owner: int
    product: Product
    first: int
    place: int = 0
    shifts: int = 1


def bundled(plans: tuple[Plan, ...], shifts: int) -> list[Line]:
    """Find whole lines that differ by one pixel, to be summed `shifts` at a time over the columns of all of them."""
    found, first = [], 0
    for owner, plan in enumerate(plans):
        bundles = {number: Line(owner, product, first + number) for number, product in enumerate(plan.products)}
        lines: dict[tuple[int, int, Piece], dict[int, int]] = {}
        for number, (u, v, rows, columns) in enumerate(plan.products if shifts > 1 else ()):
            by, (u_length, v_length) = columns.v - columns.u, (plan.sizes[side][1] for side in (u, v))
            start, end = max(0, -by), min(u_length, v_length - by)
            whole = columns == Piece(start, start + by, 1, 1, end - start)
            if whole and ONES not in (u, v) and not (u == v and is_same_walk(rows) and not by):
                lines.setdefault((u, v, rows), {})[by] = number
        for (u, v, rows), numbers in lines.items():
            for by in sorted(numbers):
                if all(by + i in numbers for i in range(shifts)):
                    members = [numbers.pop(by + i) for i in range(shifts)]
                    start = max(0, -by - shifts + 1)
                    end = min(plan.sizes[u][1], plan.sizes[v][1] - by)
                    union = Product(u, v, rows, Piece(start, start + by, 1, 1, end - start))
                    leader = first + members[0]
                    bundles |= {each: Line(owner, union, leader, i, shifts) for i, each in enumerate(members)}
        found += [bundles[number] for number in range(len(plan.products))]
        first += len(plan.products)
    return found


def is_same_walk(piece: Piece) -> bool:
    """Whether u and v are read at the same positions."""
    return piece.u == piece.v and piece.u_step == piece.v_step
