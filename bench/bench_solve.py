"""`solve` beside what PyTorch offers and gromo's own function, all in float64, held against Cholesky and a Gram side.

Users' PyTorch whitens by the symmetric square root of xx (eigh) and takes the full SVD of the target. Faster are
Cholesky, a triangular solve, the eigenproblem of the smaller Gram side and back-substitution; and, where it is known
that a few singular values stand out, as they do here, a randomized SVD in place of the Gram side. `solve` does more:
the best change of the existing weights, the bottleneck, and checks. A case is a 3×3 convolution site of C channels on
both sides, p = 9C + 1, with a fan-out of the whole kernel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import cholesky
import pytest
import torch
from cases import error
from race import Race, Way
from torch import Tensor

import growkern as gk

NEURONS = 8
TOLERANCE = 1e-6  # of the neurons' product, which neighbouring singular values make sensitive
WIDTHS = (577, 1153, 2305, 4609)
USERS = {"cpu": 2305, "cuda": 4609}  # widest p at which a full SVD is waited for without `--patience`


def rows(size: str, device: str) -> Iterator[Any]:
    for p in WIDTHS if size == "bench" else (37,):
        yield pytest.param(p, id=f"p = {p}", marks=pytest.mark.later(p // 2000))


def site(p: int, q: int, r: int, offsets: int, device: str, seed: int = 0) -> gk.Moments:
    """Moments of correlated x with a few real directions in N, as float32 sums leave them."""
    g = torch.Generator().manual_seed(seed)
    n = 2 * p + 64

    def drawn(columns: int) -> Tensor:
        base = torch.randn(n, columns, generator=g)
        return base + 0.5 * base.roll(1, 1)

    x, h, v = drawn(p), drawn(q), torch.randn(n, r * offsets, generator=g)
    x[:, -1] = h[:, -1] = 1
    real = torch.randn(p, NEURONS, generator=g), torch.randn(NEURONS, r * offsets, generator=g)
    v += x @ real[0] @ real[1] / (p * offsets) ** 0.5
    x, h, v = x.to(device), h.to(device), v.to(device)
    short = v[:, :r]
    return gk.Moments(
        site=gk.GrowthSite("0", "2", ("1",)), kernel="linear" if offsets == 1 else "full", count=n, samples=n,
        reduction="mean", slope=0.5, smooth=False, x_bias=True, h_bias=True, offsets=offsets, multiple=1,
        unit_parameters=p + r, unit_flops=p + r, fan_in_norm=1.0, fan_out_norm=1.0, xx=x.mT @ x / n,
        xv=x.mT @ v / n, hh=h.mT @ h / n, hv=h.mT @ short / n, vv=short.mT @ short / n,
        xh=x.mT @ h / n if offsets == 1 else None, xr=x.mT @ v / n, update=torch.zeros(r, q, device=device),
    )  # fmt: skip


def users(m: gk.Moments, neurons: int) -> Tensor:
    w, q = torch.linalg.eigh(m.xx.double())
    root = (q * w.clamp_min(0).rsqrt()) @ q.mT
    u, s, vh = torch.linalg.svd(root @ m.xr.double(), full_matrices=False)
    alpha = (root @ u[:, :neurons] * s[:neurons].sqrt()).mT
    return (vh[:neurons].mT * s[:neurons].sqrt()) @ alpha


def best(m: gk.Moments, neurons: int) -> Tensor:
    alpha, omega = cholesky.best_neurons(torch.linalg.cholesky(m.xx.double()), m.xr.double(), neurons)
    return omega @ alpha


def randomized(m: gk.Moments, neurons: int) -> Tensor:
    """Exact to rounding where the next singular value is a few times smaller."""
    lower = torch.linalg.cholesky(m.xx.double())
    t = torch.linalg.solve_triangular(lower, m.xr.double(), upper=False)
    u, s, v = (each[..., :neurons] for each in torch.svd_lowrank(t, q=2 * neurons, niter=10))
    return (v * s) @ torch.linalg.solve_triangular(lower.mT, u, upper=True).mT


def gromo(m: gk.Moments, neurons: int) -> Tensor:
    from gromo.utils.tools import compute_optimal_added_parameters

    # Its threshold on singular values is absolute; without it there are as many neurons.
    options = {"maximum_added_neurons": neurons, "statistical_threshold": 1e-12}
    alpha, omega, _ = compute_optimal_added_parameters(m.xx.double(), m.xr.double(), **options)
    return omega @ alpha


def ours(new: gk.NewNeurons) -> Tensor:
    return new.omega @ new.alpha


def described(name: str, device: str) -> dict[str, Any]:
    return {"op": "solve", "case": name, "dtype": "float64", "precision": "ieee", "device": device}


@pytest.mark.rows.with_args(rows)
def test_one_site(width: int, race: Race, device: str, patience: bool) -> None:
    m = site(width, width, (width - 1) // 9, 9, device)
    ways, left_out = ways_of(m, patience or width <= USERS[device])
    expected = best(m, NEURONS)
    race(described(f"p = {width}", device), ways, lambda out: error(out, expected), left_out=left_out)


def ways_of(m: gk.Moments, full_svd: bool) -> tuple[list[Way], dict[str, str]]:
    """How to solve one site, and what is left out."""
    ways = [
        Way("solve", "growkern", lambda: ours(gk.solve(m, neurons=NEURONS)), TOLERANCE),
        Way("Cholesky, Gram eigh", "pytorch", lambda: best(m, NEURONS), TOLERANCE),
        Way("Cholesky, svd_lowrank", "pytorch", lambda: randomized(m, NEURONS), TOLERANCE),
    ]
    slow = (("eigh, SVD", "users", users), ("gromo", "gromo", gromo))
    if not full_svd:
        return ways, {name: "a full SVD takes minutes" for name, _, _ in slow}
    return [*ways, *(Way(name, kind, lambda run=run: run(m, NEURONS), TOLERANCE) for name, kind, run in slow)], {}


def test_many_sites(race: Race, device: str) -> None:
    """100 sites of p ≤ 73 at once."""
    shapes = [(9, 17, 16, 1), (33, 33, 32, 1), (73, 73, 8, 9), (65, 65, 64, 1), (28, 37, 4, 9)]
    sites = {str(i): site(*shapes[i % len(shapes)], device, seed=i) for i in range(100)}

    def loop(run: Callable[[gk.Moments, int], Tensor]) -> list[Tensor]:
        return [run(m, 4) for m in sites.values()]

    expected = loop(best)
    ways = [
        Way("at once", "growkern", lambda: [*map(ours, gk.solve(sites, neurons=4).values())], TOLERANCE),
        Way("one by one", "growkern", lambda: [ours(gk.solve(m, neurons=4)) for m in sites.values()], TOLERANCE),
        Way("eigh, SVD", "users", lambda: loop(users), TOLERANCE),
        Way("Cholesky, Gram eigh", "pytorch", lambda: loop(best), TOLERANCE),
        Way("gromo", "gromo", lambda: loop(gromo), TOLERANCE),
    ]
    race(described("100 sites of p ≤ 73", device), ways, lambda out: max(map(error, out, expected)))
