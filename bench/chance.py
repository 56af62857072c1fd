"""False positives of `neurons="auto"`: how often pure noise stands out of the random-sign draws.

usage: python bench/chance.py OUT.json [--repeats N]
For every setting, fresh data with v independent of x given its scale; the top singular value of N is expressed in
standard deviations of the draws' tops above their mean, and the share above 4, 4.5 and 5 is reported.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import growkern as gk
from growkern import chance
from growkern.neurons import METHODS
from growkern.whitening import Factor, singular, whiten_both

LEVELS = (4.0, 4.5, 5.0)


def inner_product(output, direction):
    return (output * direction).flatten(1).sum(1).mean()


def linear(n, p, q, r, kind):
    model = nn.Sequential(nn.Linear(p, q), nn.ReLU(), nn.Linear(q, r))

    def data(g):
        x, v = torch.randn(n, p, generator=g), torch.randn(n, r, generator=g)
        if kind == "heavy tails":
            v = v / torch.randn(n, 1, generator=g).abs().clamp_min(0.05)
        elif kind == "scale depends on x":
            v = v * x[:, :1].abs() * x[:, 1:2].abs()
        elif kind == "cross-entropy":
            v = F.one_hot(torch.randint(0, r, (n,), generator=g), r) - torch.softmax(2 * v, 1)
        return x, v

    return model, data


def conv(n, channels, size, kind):
    model = nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))

    def data(g):
        x, v = torch.randn(n, channels, size, size, generator=g), torch.randn(n, 4, size, size, generator=g)
        if kind == "smooth":
            x, v = (F.avg_pool2d(F.pad(t, (2, 2, 2, 2), mode="circular"), 5, 1) for t in (x, v))
        elif kind == "constant in space":
            v = v.mean((2, 3), keepdim=True).expand_as(v)
        return x, v

    return model, data


def deviations(moments, method):
    """How far the top singular value is above the draws' tops."""
    rule = METHODS[method]
    hh = Factor(moments.hh)
    hv = moments.hv.double()
    bottleneck = float(moments.vv.double().trace() - (hv * hh.solve(hv)).sum())
    factor = Factor(moments.xx) if rule.whiten_x else None
    v_factor = Factor(moments.vv) if rule.whiten_v else None
    target = moments.xr.double() if rule.project else moments.xv.double()
    top = singular(whiten_both(target, factor, v_factor, moments.offsets))[1][0]
    tops = chance.tops(moments, factor, v_factor, hh, bottleneck, rule.project)
    return float((top - tops.mean()) / tops.std())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    settings = [
        *(("linear", (n, p, q, r, kind), "full") for n, p, q, r in ((64, 16, 8, 4), (256, 32, 64, 10))
          for kind in ("independent", "heavy tails", "scale depends on x", "cross-entropy")),
        *(("conv", (n, 2, 8, kind), kernel) for n in (48, 192) for kernel in ("full", "center")
          for kind in ("independent", "smooth", "constant in space")),
    ]  # fmt: skip
    for family, setting, kernel in settings:
        torch.manual_seed(0)
        model, data = {"linear": linear, "conv": conv}[family](*setting)
        site = gk.GrowthSite("0", "2", ("1",))
        found = {"tiny": [], "fisher": [], "gradmax": []}
        for repeat in range(args.repeats):
            x, v = data(torch.Generator().manual_seed(repeat))
            moments = gk.collect(model, [site], [(x, -v)], inner_product, kernel=kernel)["0"]
            for method, values in found.items():
                values.append(deviations(moments, method))
        for method, values in found.items():
            shares = {f"above {level}": sum(v > level for v in values) / len(values) for level in LEVELS}
            row = {"family": family, "setting": setting, "kernel": kernel, "method": method} | shares
            rows.append(row | {"largest": max(values)})
            print(family, setting, kernel, method, shares, f"largest {max(values):.1f}", flush=True)
    facts = {"torch": torch.__version__, "machine": platform.machine(), "repeats": args.repeats, "draws": 16}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
