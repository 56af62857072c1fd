"""What is counted as the cost of work."""

import torch

import growkern as gk
from growkern.training.cost import multiply_adds

N, M, BATCH = 12, 5, 3


def test_products_and_factors_cost_their_multiply_adds():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(BATCH, N, N, generator=generator), torch.randn(BATCH, N, M, generator=generator)
    a = a @ a.mT + torch.eye(N)
    lower = torch.linalg.cholesky(a)
    buffers = torch.empty_like(a), torch.empty(BATCH, dtype=torch.int32)
    rows = torch.randn(40, N, generator=generator)
    factor, solve = BATCH * N**3 / 6, BATCH * N**2 * M / 2
    for work, cost in (
        (lambda: a @ b, BATCH * N * N * M),
        (lambda: torch.linalg.cholesky_ex(a), factor),
        (lambda: torch.linalg.cholesky_ex(a, out=buffers), factor),
        (lambda: torch.linalg.solve_triangular(lower, b, upper=False), solve),
        (lambda: torch.linalg.qr(b), BATCH * 2 * N * M**2),
        (lambda: gk.ops.eigh(a), BATCH * 9 * N**3),
        (lambda: gk.ops.linear_moments(rows, rows, rows), 40 * 6 * N**2),
    ):
        assert multiply_adds(work)[0] == cost
