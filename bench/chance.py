"""False positives of `neurons="auto"`, and what it takes for a real direction to be found.

python bench/chance.py [--only TEXT] [--seconds N] measures what bench/results/chance/ does not hold yet, a file
for each setting, and stops after N seconds. --list says what there is; --plot draws power against strength.

Noise: fresh data with v independent of x given its scale, 500 draws where n·p·r ≤ 1e8, else 50. For each method, the
share in which `solve` finds any neuron, with the upper end of its 95% interval, and for all but "joint" the shares in
which the top singular value is 4, 4.5 and 5 standard deviations of the random-sign draws above their mean. Signal: v
gets three directions of x of equal strength, in units of the noise's deviation; the share of 100 draws with all three.
"""

import argparse
import itertools
import json
import math
import platform
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growkern as gk
from growkern import chance
from growkern.neurons import METHODS
from growkern.stacks import stack
from growkern.whitening import Factor, Whitened

RESULTS = Path(__file__).parent / "results" / "chance"
LEVELS = (4.0, 4.5, 5.0)
SITE = gk.GrowthSite("0", "2", ("1",))
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4)
RANK = 3


@dataclass(frozen=True)
class Setting:
    """Data of one kind: n rows of p features and r outputs, or n images of p channels and `side`² pixels.

    The network has `width` hidden units, or fewer than samples by far where that is 0.
    """

    kind: str
    n: int
    p: int
    r: int
    side: int = 0
    kernel: str = "full"
    strength: float = 0.0
    width: int = 0

    @property
    def name(self) -> str:
        form = f"{self.side}² {self.kernel} " if self.side else ""
        more = (f" s={self.strength}" if self.strength else "") + (f" width={self.width}" if self.width else "")
        return f"{form}{self.kind} n={self.n} p={self.p} r={self.r}{more}"

    @property
    def work(self) -> int:
        """Multiplications of one target."""
        taps, hidden = (9 if self.kernel == "full" else 1), 9 * self.p if self.side else self.p
        return self.n * max(self.side, 1) ** 2 * hidden * self.r * (taps if self.side else 1)

    @property
    def draws(self) -> int:
        return 100 if self.strength else 500 if self.work <= 1e8 else 50

    def model(self) -> nn.Module:
        hidden = self.width or max(3, min(self.p // 2, 64))
        if self.side:
            return nn.Sequential(nn.Conv2d(self.p, hidden, 3, 1, 1), nn.ReLU(), nn.Conv2d(hidden, self.r, 3, 1, 1))
        return nn.Sequential(nn.Linear(self.p, hidden), nn.ReLU(), nn.Linear(hidden, self.r))

    def data(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (self.side, self.side) if self.side else ()
        x, v = (torch.randn(self.n, width, *shape, generator=g) for width in (self.p, self.r))
        if self.kind == "heavy tails":
            v = v / torch.randn(self.n, 1, generator=g).abs().clamp_min(0.05)
        elif self.kind == "scale depends on x":
            v = v * x[:, :1].abs() * x[:, 1:2].abs()
        elif self.kind == "cross-entropy":
            v = F.one_hot(torch.randint(0, self.r, (self.n,), generator=g), self.r) - torch.softmax(2 * v, 1)
        elif self.kind == "smooth":
            x, v = (F.avg_pool2d(F.pad(t, (2, 2, 2, 2), mode="circular"), 5, 1) for t in (x, v))
        elif self.kind == "constant in space":
            v = v.mean((2, 3), keepdim=True).expand_as(v)
        elif self.kind == "signal":
            ways = (torch.linalg.qr(torch.randn(width, RANK, generator=g))[0] for width in (self.p, self.r))
            v = v + self.strength * x @ next(ways) @ next(ways).mT
        return x, v


def settings() -> list[Setting]:
    """All of them, the cheap ones first."""
    every = [Setting("independent", k * p, p, r) for p, r in itertools.product((16, 64, 256, 1024), repeat=2)
             for k in (2, 10, 100)]  # fmt: skip
    every += [
        Setting(kind, k * p, p, r)
        for kind in ("heavy tails", "scale depends on x", "cross-entropy")
        for p, r in ((16, 16), (64, 10), (256, 64))
        for k in (2, 10, 100)
    ]
    every += [
        Setting(kind, n, p, p, side, kernel)
        for kind in ("independent", "smooth", "constant in space")
        for p, side in ((2, 8), (8, 8), (16, 16))
        for n in (48, 192)
        for kernel in ("full", "center")
    ]
    every += [Setting("independent", 160, 16, 16, width=width) for width in (80, 120, 150, 160, 320)]
    kernels = ("full", "center")
    every += [Setting("independent", 32, 4, 4, 4, kernel, width=width) for kernel in kernels for width in (14, 28, 42)]
    every += [
        Setting("signal", 10 * p, p, r, strength=s) for p, r in ((16, 16), (64, 16), (256, 64)) for s in STRENGTHS
    ]
    return sorted(every, key=lambda setting: setting.work * setting.draws)


def inner_product(output: Tensor, direction: Tensor) -> Tensor:
    return (output * direction).flatten(1).sum(1).mean()


def deviations(moments: gk.Moments, method: str) -> float:
    """How far the top singular value is above the draws' tops."""
    rule, m = METHODS[method], stack([moments])

    def factor(a: Tensor) -> Factor:
        found = Factor(a, None, m.dtype)
        return found if found.sound.all() else Factor(a, None, m.dtype, True)

    hh = factor(m.hh)
    bottleneck = m.vv.diagonal(dim1=1, dim2=2).sum(1) - (m.hv * hh.solve(m.hv)).sum((1, 2))
    x, v = factor(m.xx) if rule.whiten_x else None, factor(m.vv) if rule.whiten_v else None
    top = Whitened(m.xr if rule.project else m.xv, x, v, m.offsets).singular(1, None)[0][0, 0]
    tops = chance.tops(m, x, v, hh, bottleneck, rule.project)
    return float((top - tops.mean()) / tops.std())


def upper(count: int, of: int) -> float:
    """Upper end of the one-sided 95% interval of Clopper and Pearson, by bisection."""
    low, high = count / of, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        tail = sum(math.comb(of, k) * middle**k * (1 - middle) ** (of - k) for k in range(count + 1))
        low, high = (middle, high) if tail > 0.05 else (low, middle)
    return high


def run(setting: Setting) -> dict[str, object]:
    torch.manual_seed(0)
    model, start = setting.model(), time.perf_counter()
    methods = ["tiny"] if setting.strength else ["tiny", "fisher", "gradmax"]
    methods += ["joint"] if not setting.strength and (setting.kernel == "center" or not setting.side) else []
    counts: dict[str, list[int]] = {method: [] for method in methods}
    heights: dict[str, list[float]] = {method: [] for method in methods if method != "joint" and not setting.strength}
    for draw in range(setting.draws):
        x, v = setting.data(torch.Generator().manual_seed(draw))
        moments = gk.collect(model, [SITE], [(x, -v)], inner_product, kernel=setting.kernel)["0"]
        for method, found in counts.items():
            found.append(len(gk.solve(moments, method=method)) // (2 if method == "gradmax" else 1))
        for method, found in heights.items():
            found.append(deviations(moments, method))
    rows = []
    for method, found in counts.items():
        false = sum(count > 0 for count in found)
        row: dict[str, object] = {"method": method, "counts": dict(Counter(map(str, found)))}
        if setting.strength:
            row["all found"] = sum(count == RANK for count in found) / len(found)
        else:
            row |= {"false": false, "share": false / len(found), "upper 95%": round(upper(false, len(found)), 4)}
        if method in heights:
            row |= {f"above {level}": sum(v > level for v in heights[method]) / len(found) for level in LEVELS}
            row["largest"] = round(max(heights[method]), 2)
        rows.append(row)
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return {"setting": vars(setting), "draws": setting.draws, "rows": rows, "facts": facts}


def plot() -> None:
    from matplotlib import pyplot

    lines: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for path in RESULTS.glob("signal-*.json"):
        found = json.loads(path.read_text())
        setting = found["setting"]
        lines.setdefault((setting["p"], setting["r"]), []).append((setting["strength"], found["rows"][0]["all found"]))
    for (p, r), points in sorted(lines.items()):
        pyplot.plot(*zip(*sorted(points), strict=True), "o-", label=f"p = {p}, r = {r}, n = 10p")
    pyplot.xlabel("strength of each direction, in deviations of the noise")
    pyplot.ylabel(f"share of draws with all {RANK} found, no other")
    pyplot.legend()
    pyplot.savefig(RESULTS / "power.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name has this text")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no setting after this time")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    for setting in settings():
        path = RESULTS / (re.sub(r"[^\w.=]+", "-", setting.name) + ".json")
        if args.only not in setting.name or args.plot:
            continue
        if args.list:
            flops = 40 * setting.work * setting.draws
            print(f"{'done' if path.exists() else 'to do'}  {flops / 1e9:12.0f} GFLOP  {setting.name}")
        elif not path.exists() and time.perf_counter() - start < args.seconds:
            found = run(setting)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            print(setting.name, *found["rows"], sep="\n  ", flush=True)
    if args.plot:
        plot()


if __name__ == "__main__":
    main()
