"""Make the pictures of docs/method.md: growkern's own computations on scikit-learn's digits, drawn.

usage: python docs/pictures.py [DIR]
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from torch import nn

import growkern as gk
from growkern import chance
from growkern.stacks import stack
from growkern.surgery import trial
from growkern.whitening import Factor

BLUE, ORANGE, GREEN, GREY = "#44519e", "#c9622b", "#1b7f5c", "#666666"
IMAGES, LABELS = (torch.tensor(a) for a in load_digits(return_X_y=True))
IMAGES /= 16  # (1797, 64), float64


def trained(activation, units, steps):
    """Train 64 -> units -> 10 on the digits; return the network and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, units), activation(), nn.Linear(units, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    return model, optimizer


def measure(model, target=LABELS, loss_fn=F.cross_entropy):
    """Moments of the one site of a network, on the first 512 images."""
    return gk.collect(model, gk.GrowthSite("0", "2", ("1",)), [(IMAGES[:512], target[:512])], loss_fn)["0"]


def geometry():
    """Draw v, what the weights reach of it, what is left, and what new neurons remove: lengths are to scale."""
    new = gk.solve(measure(trained(nn.Tanh, 8, 20)[0]), neurons=4)
    squares = torch.tensor([new.reachable, new.bottleneck, new.removed])
    reach, left, removed = (squares / squares[:2].sum()).sqrt().tolist()
    up, out = removed**2 / left, removed * (1 - (removed / left) ** 2) ** 0.5  # a right angle under v_perp
    _, (a, b) = pyplot.subplots(1, 2, figsize=(9, 4.1))
    for axis, start, end, colour, style, text, at in (
        (a, (0, 0), (reach, left), "black", "-", "$v$", (reach / 2 - 0.05, left / 2 + 0.03)),
        (a, (0, 0), (reach, 0), BLUE, "-", "$dW^*h$", (reach / 2 + 0.03, 0.05)),
        (a, (reach, 0), (reach, left), ORANGE, "-", "$v_\\perp$", (reach + 0.06, left / 2)),
        (b, (0, 0), (0, left), ORANGE, "-", "$v_\\perp$", (-0.06, left / 2)),
        (b, (0, 0), (out, up), GREEN, "-", "new neurons", (out + 0.06, up / 2 - 0.02)),
        (b, (out, up), (0, left), GREY, "--", "what they leave", (out + 0.09, left / 2 + 0.14)),
    ):
        arrow = dict(arrowstyle="-|>", color=colour, lw=2.2, ls=style, mutation_scale=16, shrinkA=0, shrinkB=0)
        axis.annotate("", end, start, arrowprops=arrow)
        axis.text(*at, text, color=colour, ha="center", va="center", fontsize=12)
    a.axhline(0, color=GREY, lw=1, ls=":")
    a.text(0.4, -0.05, "all that the weights can do", color=GREY, ha="center", va="top")
    a.set_title(f"The weights reach {reach**2:.0%} of $E\\|v\\|^2$,\nthe bottleneck is the other {left**2:.0%}")
    b.set_title(f"{len(new)} neurons remove {(removed / left) ** 2:.0%}\nof the bottleneck")
    for axis, corner, angle in ((a, (reach, 0), 0), (b, (out, up), math.degrees(math.atan2(left - up, -out)))):
        axis.add_patch(Rectangle(corner, 0.04, 0.04, angle=angle, fill=False, ec=GREY))
        axis.set(aspect="equal", xlim=(corner[0] - 0.7, corner[0] + 0.4), ylim=(-0.12, 0.8))
        axis.axis("off")


def spectrum():
    """Draw singular values of a site against those of random signs, for real gradients and for noise."""
    model, noise = trained(nn.ReLU, 4, 60)[0], torch.randn(1797, 10, dtype=torch.float64)
    loss_of_noise = measure(model, -noise, lambda z, v: (z * v).sum(1).mean())
    sources = ("Gradients of the loss", measure(model)), ("Noise in place of gradients", loss_of_noise)
    _, axes = pyplot.subplots(1, 2, figsize=(9, 3.7))
    for axis, (title, moments) in zip(axes, sources, strict=True):
        new, values = gk.solve(moments), gk.solve(moments, neurons=10).singular_values
        m = stack([moments])
        bottleneck = m.numbers([new.bottleneck])
        draws = chance.tops(m, Factor(m.xx, None, m.dtype), None, Factor(m.hh, None, m.dtype), bottleneck, True)[0]
        axis.axhline(new.noise, color=ORANGE, ls="--")
        axis.text(12.2, new.noise, "threshold", color=ORANGE, ha="right", va="bottom")
        axis.plot(range(1, len(values) + 1), values, "o", color=BLUE, ms=7, label="$\\lambda_k$ of the site")
        axis.plot(torch.linspace(11, 12, 16), draws, "x", color=ORANGE, ms=5, label="largest of each of 16 draws")
        axis.set(xlabel="$k$", ylim=(0, 1.12 * max(new.noise, values.max())), xlim=(0.3, 12.4), xticks=range(1, 11))
        axis.set(title=f"{title}: 'auto' keeps {len(new)}", ylabel="singular value")
    axes[0].legend(loc="lower left")


def line():
    """Draw the loss along the amplitude of new neurons, with the slope that the moments predict."""
    _, axes = pyplot.subplots(1, 3, figsize=(9, 3.6), sharey=True)
    kinds = (nn.Tanh, False, "four neurons", "exact"), (nn.ReLU, False, "four neurons", "an estimate")
    kinds, gammas = (*kinds, (nn.ReLU, True, "two ± pairs", "exact")), torch.linspace(-3, 14, 86).tolist()
    for axis, (activation, paired, kind, exact) in zip(axes, kinds, strict=True):
        model, losses = trained(activation, 8, 20)[0], []
        new = gk.solve(measure(model), neurons=4, paired=paired)
        for gamma in (0.0, *gammas):
            with trial(model, new, scale=gamma), torch.no_grad():
                losses.append(F.cross_entropy(model(IMAGES[:512]), LABELS[:512]).item())
        axis.plot(gammas, losses[1:], color=BLUE, lw=2, label="loss")
        axis.axline((0, losses[0]), slope=-new.gain, ls="--", color=ORANGE, lw=1.8, label="slope $-$gain")
        axis.plot(0, losses[0], "o", color="black", ms=5)
        axis.set(title=f"{activation.__name__}, {kind}:\ngain {new.gain:.3f}, {exact}", xlabel="scale $\\gamma$")
        axis.set(xticks=(0, 4, 8, 12), ylim=(0.75, 2.25))
    axes[0].set_ylabel("cross-entropy")
    axes[2].legend(loc="upper right")


def counting():
    """Draw how often a 3x3 consumer reads each position, and which shift each entry of xx belongs to."""
    one, three = gk.ops.ConvGeometry(1), gk.ops.ConvGeometry(3, padding=1)
    positions, images = torch.eye(64).view(1, 64, 8, 8), IMAGES.view(-1, 1, 8, 8)  # a channel for each position
    reads = gk.ops.conv2d_moments(positions, positions[:, :0], positions[:, :0], producer=one, consumer=three)[0]
    xx = gk.ops.conv2d_moments(images, images[:, :0], images[:, :0], producer=three, consumer=one)[0]
    counts = reads.diagonal().view(8, 8)  # of 9 taps, those Δy rows and Δx columns apart have shift |5Δy + Δx|
    shifts = torch.tensor([[abs(5 * (i // 3 - j // 3) + i % 3 - j % 3) for j in range(9)] for i in range(9)])
    _, axes = pyplot.subplots(1, 2, figsize=(9, 4.5))
    titles = "$c(l)$: readings of each hidden position", "xx of 3×3 patches of digits, and shifts"
    for axis, values, labels, title in zip(axes, (counts, xx), (counts.int(), shifts), titles, strict=True):
        axis.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * values.max())
        for i, j in torch.ones_like(labels).nonzero().tolist():
            axis.text(j, i, labels[i, j].item(), ha="center", va="center")
        axis.set(title=title, xticks=[], yticks=[])


def widening():
    """Draw the weights and the optimizer's state of two layers after new neurons were applied."""
    model, optimizer = trained(nn.ReLU, 6, 100)
    gk.apply(model, gk.solve(measure(model), neurons=3), scale=8, optimizer=optimizer)
    weights = model[0].weight.detach(), model[2].weight.detach()
    values = *weights, *(optimizer.state[layer.weight]["exp_avg"] for layer in (model[0], model[2]))
    titles = "producer.weight, new rows α", "consumer.weight,\nnew columns ω", *("its exp_avg in Adam",) * 2
    _, axes = pyplot.subplots(2, 2, figsize=(9, 4.8), width_ratios=(2.4, 1))
    for i, (axis, shown, title) in enumerate(zip(axes.flat, values, titles, strict=True)):
        top, box = shown.abs().flatten().quantile(0.97), (5.5, -0.5, 3, 10) if i % 2 else (-0.5, 5.5, 64, 3)
        axis.imshow(shown, cmap="PuOr", vmin=-top, vmax=top, aspect="auto")
        axis.add_patch(Rectangle(box[:2], *box[2:], fill=False, ec="black", lw=2.5, clip_on=False))
        axis.set(title=title, xticks=[], yticks=[])


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    pyplot.rc("figure.constrained_layout", use=True, h_pad=0.1)
    pyplot.rcParams.update({"axes.titlesize": 11, "legend.frameon": False})
    torch.set_num_threads(1)
    for make in (geometry, spectrum, line, counting, widening):
        make()
        pyplot.savefig(out / f"{make.__name__}.png", dpi=150, facecolor="white", metadata={"Software": None})
