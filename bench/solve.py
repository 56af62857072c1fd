"""`solve` beside what PyTorch offers: ratios of times taken in turns, after a check that all find the same neurons.

python bench/solve.py [--widths P ...] [--repeats N] [--threads N] writes bench/results/solve/<processor>.json.

Users' PyTorch whitens by the symmetric square root of xx (eigh) and takes the full SVD of the target; best PyTorch
takes Cholesky, a triangular solve, the eigenproblem of the smaller Gram side and back-substitution. All in float64.
A case is a 3×3 convolution site of C channels on both sides, p = 9C + 1, with a fan-out of the whole kernel. From
p = 2000 on each way runs once, cold.
"""

import argparse
import json
import platform
import re
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import growkern as gk
from growkern.ops.native import build_info

RESULTS = Path(__file__).parent / "results" / "solve"
NEURONS = 8


def site(p: int, q: int, r: int, offsets: int, seed: int = 0) -> gk.Moments:
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
    short = v[:, :r]
    return gk.Moments(
        site=gk.GrowthSite("0", "2", ("1",)), kernel="linear" if offsets == 1 else "full", count=n, reduction="mean",
        slope=0.5, smooth=False, x_bias=True, h_bias=True, offsets=offsets, multiple=1, unit_parameters=p + r,
        unit_flops=p + r, fan_in_norm=1.0, fan_out_norm=1.0, xx=x.mT @ x / n, xv=x.mT @ v / n, hh=h.mT @ h / n,
        hv=h.mT @ short / n, vv=short.mT @ short / n, xh=x.mT @ h / n if offsets == 1 else None,
        xr=x.mT @ v / n, update=torch.zeros(r, q),
    )  # fmt: skip


def users(m: gk.Moments) -> Tensor:
    w, q = torch.linalg.eigh(m.xx.double())
    root = (q * w.clamp_min(0).rsqrt()) @ q.mT
    u, s, vh = torch.linalg.svd(root @ m.xr.double(), full_matrices=False)
    alpha = (root @ u[:, :NEURONS] * s[:NEURONS].sqrt()).mT
    return (vh[:NEURONS].mT * s[:NEURONS].sqrt()) @ alpha


def best(m: gk.Moments) -> Tensor:
    lower = torch.linalg.cholesky(m.xx.double())
    t = torch.linalg.solve_triangular(lower, m.xr.double(), upper=False)
    w, v = torch.linalg.eigh(t.mT @ t)
    s, v = w[-NEURONS:].sqrt(), v[:, -NEURONS:]
    alpha = torch.linalg.solve_triangular(lower.mT, t @ v / s, upper=True) * s.sqrt()
    return (v * s.sqrt()) @ alpha.mT


def ours(m: gk.Moments) -> Tensor:
    new = gk.solve(m, neurons=NEURONS)
    return new.omega @ new.alpha


def timed(run, *args: object) -> tuple[float, object]:
    start = time.perf_counter()
    out = run(*args)
    return time.perf_counter() - start, out


def one(p: int, repeats: int, with_users: bool) -> dict[str, object]:
    channels = (p - 1) // 9
    m = site(p, p, channels, 9)
    ways = {"solve": ours, "best PyTorch": best} | ({"users' PyTorch": users} if with_users else {})
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        found = {}
        for name, run in ways.items():
            seconds, found[name] = timed(run, m)
            if turn or not repeats:
                taken[name].append(seconds)
        for other in found.values():
            assert (other - found["solve"]).norm() < 1e-6 * found["solve"].norm(), p
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    row = {"p": p, "target": list(m.xv.shape), "neurons": NEURONS, "s": round(median["solve"], 3)}
    return row | {f"over {name}": round(median[name] / median["solve"], 2) for name in ways if name != "solve"}


def many(repeats: int) -> dict[str, object]:
    """100 sites of p ≤ 73 at once, beside one after the other."""
    shapes = [(9, 17, 16, 1), (33, 33, 32, 1), (73, 73, 8, 9), (65, 65, 64, 1), (28, 37, 4, 9)]
    sites = {str(i): site(*shapes[i % len(shapes)], seed=i) for i in range(100)}
    at_once, in_turn = [], []
    for turn in range(repeats + 1):
        seconds, together = timed(lambda: gk.solve(sites, neurons=4))
        others, alone = timed(lambda: {name: gk.solve(each, neurons=4) for name, each in sites.items()})
        if turn:
            at_once.append(seconds)
            in_turn.append(others)
    for name, new in together.items():
        a, b = new.omega @ new.alpha, alone[name].omega @ alone[name].alpha
        assert (a - b).norm() < 1e-9 * b.norm(), name
    ratio = statistics.median(in_turn) / statistics.median(at_once)
    return {"sites": 100, "s": round(statistics.median(at_once), 4), "over a loop": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[577, 1153, 2305, 4609])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--users-up-to", type=int, default=4609, help="widest p at which users' PyTorch runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [many(args.repeats)]
    print(rows[0], flush=True)
    for p in args.widths:
        rows.append(one(p, args.repeats if p < 2000 else 0, p <= args.users_up_to))
        print(rows[-1], flush=True)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    hardware = {"processor": processor[1] if processor else platform.processor(), "threads": torch.get_num_threads()}
    hardware |= {"torch": torch.__version__, "build": build_info()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W+", "-", hardware["processor"]).strip("-").lower()
    path = RESULTS / f"{stem}-{hardware['threads']}-threads.json"
    path.write_text(json.dumps({"hardware": hardware, "results": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
