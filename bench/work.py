"""What the call of an op costs at least: operations as they are counted, and bytes of inputs and results."""

import math
from collections.abc import Callable

from cases import Case, Conv2dCase, LinearCase, MatrixCase
from torch import Tensor

from growkern.ops.moments.plan import Plan, conv2d_plan, linear_plan, residual_plan


def operations(case: Case) -> float:
    """Of the moments, with what taps share summed once (growkern's plan); of decompositions, of LAPACK's algorithms.

    The latter are nominal: 9n³ (`eigh`) and 14mn² + 8n³ (`svd`), from Golub and Van Loan.
    """
    if isinstance(case, MatrixCase):
        *batch, m, n = case.shape
        count, m, n = math.prod(batch), max(m, n), min(m, n)
        return count * (9 * n**3 if case.op == "eigh" else 14 * m * n**2 + 8 * n**3)
    if isinstance(case, LinearCase):
        p, q, r = case.widths[0] + case.x_bias, case.widths[1] + case.h_bias, case.widths[2]
        if case.op == "linear_moments":
            return _of_plan(linear_plan(case.widths, case.x_bias, case.h_bias), case.rows)
        if case.rows_per_sign == 1:
            return 2.0 * case.rows * r * (q + p + case.draws * (p + q))
        runs = -(-case.rows // case.rows_per_sign)  # whose sums are added up under all draws
        return 2.0 * r * (case.rows * (q + p + q) + runs * case.draws * (p + q))
    assert isinstance(case, Conv2dCase)
    plan = _plan(case, conv2d_plan if case.op == "conv2d_moments" else residual_plan)
    found = _of_plan(plan, case.batch)
    if case.op == "conv2d_residual":
        (height, width), q = case.outputs, case.channels[1] * case.consumer.taps + case.h_bias
        found += 2 * case.batch * height * width * q * case.channels[2]
        found += 2 * case.batch * case.draws * sum(m * n for m, n in plan.shapes)
    return found


def nbytes(*groups: object) -> int:
    """Of all tensors among the given values."""
    found = 0
    for group in groups:
        values = group.values() if isinstance(group, dict) else group
        found += sum(value.nbytes for value in values if isinstance(value, Tensor))  # type: ignore[attr-defined]
    return found


def _plan(case: Conv2dCase, make: Callable[..., Plan]) -> Plan:
    sizes = (case.maps, case.hidden, case.outputs)
    full = case.kernel == "full"
    return make(case.channels, sizes, case.producer, case.consumer, full, case.x_bias, case.h_bias)


def _of_plan(plan: Plan, samples: int) -> float:
    extents = [plan.extent(number) for number in range(len(plan.products))]
    lengths = [p.rows.length * p.columns.length for p in plan.products]
    return 2.0 * samples * sum(m * n * length for (m, n), length in zip(extents, lengths, strict=True))
