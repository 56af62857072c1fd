"""Jacobi's method on small matrices, one matrix per program and in its registers throughout.

Rows and columns stay where they are. A round of a sweep pairs each column j with one partner, which is a formula of j
and the round; what the partner holds comes by a gather. All rotations of a round touch disjoint pairs, so that all
angles are known before the first is applied, and each column computes its own half of the rotation: s and τ have
opposite signs at the two columns of a pair, which makes one formula of the two.
"""

import triton
import triton.language as tl


@triton.jit
def _divide(x, y):
    # float32 division is approximate in Triton unless one asks for more, and then rotations are not orthogonal
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _partners(j, turn, even):
    """Columns that meet j in this round: j + partner ≡ turn modulo even − 1, and the last meets whom that leaves."""
    last = even - 1
    other = (turn - j + last) % last
    other = tl.where(other == j, last, other)
    other = tl.where(j == last, turn * (even // 2) % last, other)
    return tl.where(j > last, j, other)


@triton.jit
def _rotations(own, other, product, j, partner):
    """Tangents t, s and τ = s/(1 + c) by which (own, product; product, other) becomes diagonal; 0 where it is."""
    zero = product * 0
    theta = _divide(other - own, tl.where(product == 0, zero + 1, product + product))
    size = tl.abs(theta)
    t = _divide(zero + 1, size + _root(1 + size * size))
    t = tl.where((theta < 0) | ((theta == 0) & (j > partner)), -t, t)
    t = tl.where(product == 0, zero, t)
    c = _divide(zero + 1, _root(1 + t * t))
    s = t * c
    return t, s, _divide(s, 1 + c)


@triton.jit
def _turn_columns(x, index, s, tau):
    # Rutishauser's form keeps the product of all rotations orthogonal
    return x - s[None, :] * (tl.gather(x, index, 1) + tau[None, :] * x)


@triton.jit
def _row(x, k, row):
    return tl.sum(tl.where(row == k, x, 0.0), 0)


@triton.jit
def _orthonormalise(v, n, row, column):
    """One step of Newton and Schulz, v ← 1.5 v − 0.5 v vᵀv: the rounding of hundreds of rotations is undone."""
    # Products are sums of outer products, here and below: `tl.dot` of float32 in full precision spills registers.
    gram = v * 0
    for k in range(n):
        each = _row(v, k, row)
        gram += each[:, None] * each[None, :]
    product = v * 0
    for k in range(n):
        product += tl.sum(tl.where(column == k, v, 0.0), 1)[:, None] * _row(gram, k, row)[None, :]
    return 1.5 * v - 0.5 * product


@triton.jit
def _unit(a):
    """Whether all entries are finite, and what to divide them by so that squares neither overflow nor vanish."""
    finite = tl.abs(a) < float("inf")
    largest = tl.max(tl.max(tl.where(finite, tl.abs(a), 0.0), 1), 0)
    whole = tl.sum(tl.sum(tl.where(finite, 0, 1), 1), 0) == 0
    return whole, tl.where(largest > 0, largest, largest * 0 + 1)


@triton.jit(do_not_specialize=["n"])
def eigh_kernel(a_ptr, w_ptr, q_ptr, n, TOLERANCE: tl.constexpr, SWEEPS: tl.constexpr, N: tl.constexpr):
    """Decompose matrix number `program` of a (·, n, n), whose lower triangle counts: ascending w, columns q.

    It has converged once the off-diagonal part is below TOLERANCE times the whole.
    """
    first = tl.program_id(0).to(tl.int64) * n
    j = tl.arange(0, N)
    row, column = j[:, None], j[None, :]
    inside = (row < n) & (column < n)
    below = a_ptr + first * n + tl.maximum(row, column) * n + tl.minimum(row, column)
    a = tl.load(below, mask=inside, other=0.0)
    finite, unit = _unit(a)
    a = tl.where(finite, _divide(a, tl.broadcast_to(unit, (N, N))), 0.0)
    limit = tl.sum(tl.sum(a * a, 1), 0) * (TOLERANCE * TOLERANCE)
    d = tl.sum(tl.where(row == column, a, 0.0), 0)
    a = tl.where(row == column, 0.0, a)  # the diagonal lives in d from here on
    v = tl.where(row == column, 1.0, a * 0)

    even = n + n % 2
    off = tl.sum(tl.sum(a * a, 1), 0)
    sweeps = 0
    while (off > limit) & (sweeps < SWEEPS):
        for turn in tl.range(even - 1, disable_licm=True):  # hoisted masks would spill
            partner = _partners(j, turn, even)
            across = tl.broadcast_to(partner[None, :], (N, N))
            met = row == partner[None, :]
            product = tl.sum(tl.where(met, a, 0.0), 0)
            product = 0.5 * (product + tl.gather(product, partner, 0))  # the same bits at both ends of a pair
            t, s, tau = _rotations(d, tl.gather(d, partner, 0), product, j, partner)
            d -= t * product
            a = _turn_columns(a, across, s, tau)
            down = tl.gather(a, tl.broadcast_to(partner[:, None], (N, N)), 0)
            a -= s[:, None] * (down + tau[:, None] * a)
            a = tl.where(met, 0.0, a)
            v = _turn_columns(v, across, s, tau)
        off = tl.sum(tl.sum(tl.where(row == column, 0.0, a * a), 1), 0)
        sweeps += 1

    v = _orthonormalise(v, n, row, column)
    product = v * 0
    for k in range(n):
        each = tl.load(a_ptr + first * n + tl.maximum(j, k) * n + tl.minimum(j, k), mask=j < n, other=0.0)
        each = tl.where(finite, _divide(each, tl.broadcast_to(unit, (N,))), 0.0)
        product += each[:, None] * _row(v, k, row)[None, :]
    w = tl.where(j < n, tl.sum(v * product, 0), float("inf"))
    place = _places(w, row, column)
    good = finite & (off <= limit)
    tl.store(w_ptr + first + place, tl.where(good, w * unit, float("nan")), mask=j < n)
    tl.store(q_ptr + first * n + row * n + place[None, :], tl.where(good, v, float("nan")), mask=inside)


@triton.jit
def _places(key, row, column):
    """Rank of each key among all, equal ones in order: the column where it belongs."""
    mine = tl.sum(tl.where(row == column, key[None, :], 0.0), 1)[:, None]  # the same keys along rows
    before = (mine < key[None, :]) | ((mine == key[None, :]) & (row < column))
    return tl.sum(before.to(tl.int32), 0)


@triton.jit(do_not_specialize=["m", "n"])
def svd_kernel(
    a_ptr, u_ptr, s_ptr, vh_ptr, m, n,
    TOLERANCE: tl.constexpr, TINY: tl.constexpr, SWEEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Decompose matrix number `program` of a (·, m, n), m ≥ n: u (m, n), descending s, vh (n, n).

    One-sided: columns are rotated until each two are orthogonal to TOLERANCE relative to their own lengths, so that
    small singular values are as accurate as large ones. Columns whose squared length is below TINY count as zero.
    """
    batch = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, M), tl.arange(0, N)
    inside = (i[:, None] < m) & (j[None, :] < n)
    a = tl.load(a_ptr + batch * m * n + i[:, None] * n + j[None, :], mask=inside, other=0.0)
    finite, unit = _unit(a)
    a = tl.where(finite, _divide(a, tl.broadcast_to(unit, (M, N))), 0.0)
    row, column = j[:, None], j[None, :]
    v = tl.where(row == column, 1.0, tl.zeros((N, N), a.dtype))

    even = n + n % 2
    worst = unit * 0 + 1
    sweeps = 0
    while (worst > TOLERANCE) & (sweeps < SWEEPS):
        worst = unit * 0
        for turn in tl.range(even - 1, disable_licm=True):  # hoisted masks would spill
            partner = _partners(j, turn, even)
            across = tl.broadcast_to(partner[None, :], (M, N))
            met = tl.gather(a, across, 1)
            power, product = tl.sum(a * a, 0), tl.sum(a * met, 0)
            other = tl.gather(power, partner, 0)
            product = 0.5 * (product + tl.gather(product, partner, 0))  # the same bits at both ends of a pair
            product = tl.where((power > TINY) & (other > TINY) & (partner != j), product, 0.0)
            lengths = _root(tl.where(power > TINY, power, 1.0)) * _root(tl.where(other > TINY, other, 1.0))
            worst = tl.maximum(worst, tl.max(tl.abs(product) / lengths, 0))
            _, s, tau = _rotations(power, other, product, j, partner)
            a -= s[None, :] * (met + tau[None, :] * a)
            v = _turn_columns(v, tl.broadcast_to(partner[None, :], (N, N)), s, tau)
        sweeps += 1

    v = _orthonormalise(v, n, row, column)
    power = tl.sum(a * a, 0)
    length = _root(power)
    alive = power > TINY
    u = tl.where(alive[None, :], _divide(a, tl.broadcast_to(tl.where(alive, length, 1.0)[None, :], (M, N))), 0.0)
    for k in range(n):
        if tl.sum(((j == k) & alive).to(tl.int32), 0) == 0:
            # A null direction takes what is left of the unit vector that the others cover least.
            covered = tl.where(i < m, tl.sum(u * u, 1), float("inf"))
            fresh = tl.where(i == tl.argmin(covered, 0), 1.0, covered * 0)
            fresh = tl.where(i < m, fresh, 0.0)
            for _ in range(2):
                fresh -= tl.sum(u * tl.sum(u * fresh[:, None], 0)[None, :], 1)
            fresh = _divide(fresh, tl.broadcast_to(_root(tl.sum(fresh * fresh, 0)), (M,)))
            u = tl.where(column == k, fresh[:, None], u)
    place = _places(tl.where(j < n, -length, float("inf")), row, column)
    good = finite & (worst <= TOLERANCE)
    tl.store(s_ptr + batch * n + place, tl.where(good, length * unit, float("nan")), mask=j < n)
    u_out = u_ptr + batch * m * n + i[:, None] * n + place[None, :]
    tl.store(u_out, tl.where(good, u, float("nan")), mask=inside)
    vh_out = vh_ptr + batch * n * n + place[None, :] * n + row
    tl.store(vh_out, tl.where(good, v, float("nan")), mask=(row < n) & (column < n))
