"""The compiled CPU kernels beside PyTorch: ratios of times taken in turns, after a check against float64.

python bench/cpu_native.py [--only TEXT] [--repeats N] writes bench/results/cpu-native/<processor>.json.
"""

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from growkern import ops
from growkern.backend import use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments.plan import Product, conv2d_plan
from growkern.ops.native import build_info

RESULTS = Path(__file__).parent / "results" / "cpu-native"
TOLERANCE = 2e-6

Six = list[Tensor]


# As people write it, and other ways that PyTorch offers --------------------------------------------------


def rows(patches: Tensor) -> Tensor:
    """(images, features, positions) → (features, images·positions)."""
    return patches.transpose(0, 1).flatten(1)


def unfold(maps: Tensor, g: ConvGeometry) -> Tensor:
    return F.unfold(maps, g.kernel_size, g.dilation, g.padding, g.stride)


def moved(v: Tensor, g: ConvGeometry, hidden: torch.Size) -> Tensor:
    """v at the hidden positions that each tap reads, (images, r·taps, positions)."""
    (kh, kw), (sh, sw) = g.kernel_size, g.stride
    spread = v.new_zeros(*v.shape[:2], (v.shape[2] - 1) * sh + 1, (v.shape[3] - 1) * sw + 1)
    spread[..., ::sh, ::sw] = v
    before = [g.span(axis) - 1 - g.padding[axis] for axis in (0, 1)]
    after = [hidden[axis] + g.span(axis) - 1 - before[axis] - spread.shape[2 + axis] for axis in (0, 1)]
    windows = F.unfold(F.pad(spread, (before[1], after[1], before[0], after[0])), g.kernel_size, g.dilation)
    return windows.unflatten(1, (-1, kh * kw)).flip(2).flatten(1, 2)


def counts(g: ConvGeometry, hidden: torch.Size, outputs: torch.Size) -> Tensor:
    """How often the consumer reads each hidden position, (rows, columns)."""
    return moved(torch.ones(1, 1, *outputs), g, hidden).sum(1).view(*hidden)


def by_unfold(x: Tensor, h: Tensor, v: Tensor, producer: ConvGeometry, consumer: ConvGeometry) -> Six:
    c = counts(consumer, h.shape[2:], v.shape[2:]).flatten()
    xs, hs, vs = unfold(x, producer), rows(unfold(h, consumer)), rows(v.flatten(2))
    xx = rows(xs * c) @ rows(xs).T
    xv = rows(xs) @ rows(moved(v, consumer, h.shape[2:])).T
    return [xx, xx.new_empty(len(xx), 0), xv, hs @ hs.T, hs @ vs.T, vs @ vs.T]


def by_weight_gradients(x: Tensor, h: Tensor, v: Tensor, producer: ConvGeometry, consumer: ConvGeometry) -> Six:
    """One gradient of convolution weights for every tap of the right-hand side."""

    def moment(left: Tensor, g: ConvGeometry, right: Tensor) -> Tensor:
        shape = (right.shape[1], left.shape[1], *g.kernel_size)
        return torch.nn.grad.conv2d_weight(left, shape, right, g.stride, g.padding, g.dilation).flatten(1).T

    def taps(maps: Tensor, g: ConvGeometry, size: torch.Size) -> Tensor:
        return unfold(maps, g).unflatten(1, (-1, g.taps)).unflatten(3, size)

    def columns(left: Tensor, g: ConvGeometry, right: Tensor) -> Tensor:
        return torch.stack([moment(left, g, right[:, :, t].contiguous()) for t in range(right.shape[2])], 2).flatten(1)

    hidden, outputs = h.shape[2:], v.shape[2:]
    xs = taps(x, producer, hidden) * counts(consumer, hidden, outputs)
    vs = moved(v, consumer, hidden).unflatten(1, (-1, consumer.taps)).unflatten(3, hidden)
    xx, xv = columns(x, producer, xs), columns(x, producer, vs)
    hh, hv = columns(h, consumer, taps(h, consumer, outputs)), moment(h, consumer, v)
    flat = rows(v.flatten(2))
    return [xx, xx.new_empty(len(xx), 0), xv, hh, hv, flat @ flat.T]


def by_shifted_gemms(x: Tensor, h: Tensor, v: Tensor, producer: ConvGeometry, consumer: ConvGeometry) -> Six:
    """Correlations as products of a padded buffer with itself shifted, border strips taken off: stride 1 only.

    Which correlations, and how they make up the blocks, is growkern's own plan: what a reader of this library
    would write in PyTorch.
    """
    channels, sizes = tuple(m.shape[1] for m in (x, h, v)), tuple(tuple(m.shape[2:]) for m in (x, h, v))
    plan = conv2d_plan(channels, sizes, producer, consumer, True, False, False)
    images = [m.permute(0, 2, 3, 1).contiguous() for m in (x, h, v)]
    reach = max(abs(p.columns.u - p.columns.v) for p in plan.products)
    pitch = max(size[1] for size in sizes) + reach
    flat = [F.pad(m, (0, 0, 0, pitch - m.shape[2], 0, reach)).flatten(0, 2) for m in images]

    def product(p: Product) -> Tensor:
        if p.rows.length * p.columns.length * 2 > x.shape[2] * x.shape[3]:
            shift = (p.rows.v - p.rows.u) * pitch + p.columns.v - p.columns.u
            u, w, n = flat[p.u], flat[p.v], len(flat[p.u])
            return u[max(0, -shift) : n - max(0, shift)].T @ w[max(0, shift) : n - max(0, -shift)]
        sides = []
        for side in (0, 1):
            rows, columns = (slice(q[side], q[side] + q.length) for q in (p.rows, p.columns))
            sides.append(images[p[side]][:, rows, columns].flatten(0, 2))
        return sides[0].T @ sides[1]

    results = []
    for region in plan.regions:
        pairs = [(a, b) for a in range(region.u_taps) for b in range(region.v_taps)]
        upper = [i for i, terms in enumerate(region.blocks) if not any(term.transposed for term in terms)]
        used = sorted({term.product for i in upper for term in region.blocks[i]})
        weights = torch.zeros(len(upper), len(used))
        for row, i in enumerate(upper):
            for term in region.blocks[i]:
                weights[row, used.index(term.product)] += term.weight
        shape = (region.u_channels, region.v_channels)
        sums = weights @ torch.stack([product(plan.products[number]) for number in used]).flatten(1)
        blocks = sums.view(-1, *shape)
        if len(upper) < len(pairs):
            row_of = {pairs[i]: row for row, i in enumerate(upper)}
            blocks = torch.stack([blocks[row_of[p]] if p in row_of else blocks[row_of[p[::-1]]].T for p in pairs])
        grid = blocks.view(region.u_taps, region.v_taps, *shape)
        results.append(grid.permute(2, 0, 3, 1).flatten(2).flatten(0, 1))
    results.insert(1, results[0].new_empty(len(results[0]), 0))
    return results


def six_products(x: Tensor, h: Tensor, v: Tensor) -> Six:
    return [torch.mm(a.T, b) for a, b in ((x, x), (x, h), (x, v), (h, h), (h, v), (v, v))]


# Measuring ------------------------------------------------------------------------------------------------


def error(out: Tensor, ref: Tensor) -> float:
    return float((out.double() - ref).norm() / ref.norm()) if ref.numel() else 0.0


def seconds(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each, taken in turns so that a busy machine slows all of them."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def ceilings() -> dict[str, float]:
    """What this machine did in this run: a large matrix product, and a copy of more than the caches hold."""
    a, big = torch.randn(3072, 3072), torch.randn(64 << 20)
    target = torch.empty_like(big)
    took = seconds({"mm": lambda: a @ a, "copy": lambda: target.copy_(big)}, 7)
    return {"torch.mm GFLOP/s": 2 * 3072**3 / took["mm"] / 1e9, "copy GB/s": 2 * big.nbytes / took["copy"] / 1e9}


Record = dict[str, object]


def conv2d(
    name: str, channels: int, side: int, batch: int, producer: ConvGeometry, consumer: ConvGeometry, repeats: int
) -> Record:
    hidden = producer.output_size(side, side)
    sizes = ((side, side), hidden, consumer.output_size(*hidden))
    x, h, v = (torch.randn(batch, channels, *size) + 0.3 for size in sizes)

    def native() -> object:
        with use_backend("cpp"):
            return ops.conv2d_moments(x, h, v, producer=producer, consumer=consumer)

    def chunked() -> object:
        with use_backend("reference"):
            return ops.conv2d_moments(x, h, v, producer=producer, consumer=consumer)

    usual = {"unfold + mm": lambda: by_unfold(x, h, v, producer, consumer), "chunked unfold + addmm": chunked}
    usual["weight gradients"] = lambda: by_weight_gradients(x, h, v, producer, consumer)
    with use_backend("reference"):
        few = [maps[:8].double() for maps in (x, h, v)]
        expected = ops.conv2d_moments(*few, producer=producer, consumer=consumer)
    with use_backend("cpp"):
        out = ops.conv2d_moments(x[:8], h[:8], v[:8], producer=producer, consumer=consumer)
    assert max(map(error, out, expected)) < TOLERANCE, name
    same = ConvGeometry(3, 1, 1)
    ways = [by_unfold, by_weight_gradients] + [by_shifted_gemms] * (producer == consumer == same)
    for way in ways:
        out = way(x[:8], h[:8], v[:8], producer, consumer)
        assert max(map(error, out, expected)) < 1e-5, (name, way.__name__)
    record: Record = {}
    if producer == consumer == same:
        usual["shifted GEMMs"] = lambda: by_shifted_gemms(x, h, v, producer, consumer)
        record["GFLOP counted"] = 61 * 2 * channels**2 * batch * side**2 / 1e9
    took = seconds({"cpp": native, **usual}, repeats)
    record |= {
        "case": name,
        "ms": round(took["cpp"] * 1e3, 2),
        "over users' PyTorch": round(took["unfold + mm"] / took["cpp"], 2),
        "over best PyTorch": round(min(took[way] for way in usual) / took["cpp"], 2),
        "best PyTorch": min(usual, key=took.__getitem__),
    }
    if "GFLOP counted" in record:
        record["GFLOP/s"] = round(record["GFLOP counted"] / took["cpp"], 1)
    return record


def linear(name: str, samples: int, widths: tuple[int, int, int], repeats: int) -> Record:
    x, h, v = (torch.randn(samples, width) + 0.3 for width in widths)

    def native() -> tuple[Tensor, ...]:
        with use_backend("cpp"):
            return ops.linear_moments(x, h, v)

    assert max(map(error, native(), six_products(x.double(), h.double(), v.double()))) < TOLERANCE, name
    took = seconds({"cpp": native, "mm": lambda: six_products(x, h, v)}, repeats)
    return {"case": name, "ms": round(took["cpp"] * 1e3, 3), "over six torch.mm": round(took["mm"] / took["cpp"], 2)}


def eigh(count: int, n: int, dtype: torch.dtype, repeats: int) -> Record:
    a = torch.randn(count, n, n, dtype=dtype)
    a = a @ a.mT / n

    def native() -> tuple[Tensor, Tensor]:
        with use_backend("cpp"):
            return ops.eigh(a)

    w, q = native()
    scale = 1e-6 if dtype == torch.float32 else 2e-15
    assert ((q * w[:, None]) @ q.mT - a).norm(dim=(1, 2)).max() < 2 * scale * n**0.5 * a.norm(dim=(1, 2)).max()
    took = seconds({"cpp": native, "torch": lambda: torch.linalg.eigh(a)}, repeats)
    name = f"{count}×{n}² {str(dtype).removeprefix('torch.')}"
    return {
        "case": name,
        "ms": round(took["cpp"] * 1e3, 3),
        "over torch.linalg.eigh": round(took["torch"] / took["cpp"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    same = ConvGeometry(3, 1, 1)
    two, five, one, wide = ConvGeometry(3, 2, 1), ConvGeometry(5, 1, 2), ConvGeometry(1), ConvGeometry(3, 1, 2, 2)
    r = chosen.repeats
    jobs = [
        *(
            (f"conv2d 3×3, {c} channels, {s}², batch {b}", lambda n, c=c, s=s, b=b: conv2d(n, c, s, b, same, same, r))
            for c, s, b in ((8, 32, 256), (16, 32, 256), (64, 32, 128), (128, 16, 128), (256, 8, 128))
        ),
        *(
            (f"conv2d {text}, 32 channels, 32², batch 64", lambda n, p=p, q=q: conv2d(n, 32, 32, 64, p, q, r))
            for text, p, q in (
                ("3×3 stride 2 then 3×3", two, same),
                ("3×3 then 3×3 stride 2", same, two),
                ("5×5", five, five),
                ("1×1", one, one),
                ("dilation 2", wide, wide),
            )
        ),
        *(
            (f"linear {w}, 4096 rows", lambda n, w=w: linear(n, 4096, (w, w, w), 30 * r))
            for w in (16, 32, 64, 128, 256)
        ),
        ("linear 768, 3072, 768, 8192 rows", lambda n: linear(n, 8192, (768, 3072, 768), r)),
        *(
            (f"eigh {n}² {d}", lambda _, b=b, n=n, d=d: eigh(b, n, d, 3 * r))
            for d in (torch.float32, torch.float64)
            for b, n in ((1000, 8), (1000, 16), (128, 33), (128, 64), (100, 100), (64, 128))
        ),
    ]
    results = []
    for name, job in jobs:
        if chosen.only in name:
            results.append(job(name))
            print(results[-1], flush=True)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    hardware = {
        "processor": processor[1] if processor else platform.processor(),
        "instruction sets": sorted(set(re.findall(r"\b(avx2|avx512f|fma)\b", Path("/proc/cpuinfo").read_text()))),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": build_info(),
    }
    record = {"hardware": hardware, "ceilings": ceilings(), "command": "python bench/cpu_native.py", "results": results}
    print(record["ceilings"])
    if not chosen.only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"\W+", "-", hardware["processor"]).strip("-").lower()
        path = RESULTS / f"{stem}-{hardware['threads']}-threads.json"
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
