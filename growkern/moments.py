"""MEASURE what a site's layers see and what the loss wants of them: second moments of (x, h, v) by hooks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growkern import distributed, storage
from growkern.arguments import check_collected, listed
from growkern.brief import Brief
from growkern.eval_mode import evaluating
from growkern.passes import Passes, Recording
from growkern.probe import LossFn, Probe, draws_of, measured_together, residuals_together, share_uniform
from growkern.sites import GrowthSite
from growkern.whitening import least_squares


@dataclass(repr=False)
class Moments(Brief):
    """Second moments of one site, as means over `count` images or rows; symbols as in TINY.

    Moments of several batches, workers or machines add: ``a + b``. A tensor that was not measured is None.

    Attributes
    ----------
    site : GrowthSite
        The site they belong to.
    kernel : str
        "linear"; for convolutions "full" or "center".
    count, samples, reduction : int, int, str
        Images, or rows; samples of h in all of them; and how the loss sums over them.
    slope : float
        Mean one-sided derivative at 0 of what lies between the layers; `smooth` says whether both agree.
    x_bias, h_bias : bool
        Whether x and h end in a column of ones.
    offsets : int
        Kernel offsets of the consumer that share one `xx`: kh·kw for "full", else 1.
    multiple, unit_parameters, unit_flops : int
        New units come in multiples; parameters and multiply-adds per image or row that one costs.
    fan_in_norm, fan_out_norm : float
        Mean norms of the existing units' weights.
    xx, xh, xv, hh, hv, vv : Tensor
        (p, p), (p, q), (p, r·offsets), (q, q), (q, r), (r, r). `xh` is None for "full".
    xr : Tensor or None
        N = E[x v⊥ᵀ] measured directly in a second pass, like `xv`.
    null, null_h : Tensor or None
        The same with random signs, (draws, p, r·offsets), and E[s h v⊥ᵀ], (draws, q, r).
    x_mean, x_second : Tensor or None
        Uniform moments of x, (p,) and (p, p), where a norm lies between.
    update : Tensor or None
        dW* (r, q), behind `xr` and `null`.
    """

    site: GrowthSite
    kernel: str
    count: int
    samples: int
    reduction: str
    slope: float
    smooth: bool
    x_bias: bool
    h_bias: bool
    offsets: int
    multiple: int
    unit_parameters: int
    unit_flops: int
    fan_in_norm: float
    fan_out_norm: float
    xx: Tensor
    xv: Tensor
    hh: Tensor
    hv: Tensor
    vv: Tensor
    xh: Tensor | None = None
    xr: Tensor | None = None
    null: Tensor | None = None
    null_h: Tensor | None = None
    x_mean: Tensor | None = None
    x_second: Tensor | None = None
    update: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that were measured, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, *args: Any, **kwargs: Any) -> Moments:
        """Copy with every tensor moved or cast as by `Tensor.to`."""
        moved: dict[str, Any] = {k: t.to(*args, **kwargs) for k, t in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def __add__(self, other: Moments) -> Moments:
        """Pool two measurements of the same site in the same model; others, or other dW*, are a ValueError."""
        if not isinstance(other, Moments):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        for what, a, b in (
            ("site", self.site, other.site),
            ("kernel", self.kernel, other.kernel),
            ("reduction", self.reduction, other.reduction),
            ("shapes", *({k: tuple(t.shape) for k, t in tensors.items()} for tensors in (mine, theirs))),
        ):
            if a != b:
                raise ValueError(f"moments of one {what} add; got {a} and {b}")
        if self.update is not None and other.update is not None and not torch.equal(self.update, other.update):
            raise ValueError(
                "xr and null of two second passes add only if both used the same dW*: measure in one collect(), "
                "over a torch.distributed group, or with kernel='center' and null_draws=0"
            )
        share = self.count / (self.count + other.count)
        pooled: dict[str, Any] = {name: mine[name] * share + theirs[name] * (1 - share) for name in mine}
        pooled |= {"samples": self.samples + other.samples, "update": self.update}
        return dataclasses.replace(self, count=self.count + other.count, **pooled)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, replaced as a whole or not at all."""
        facts = {name: value for name, value in vars(self).items() if isinstance(value, str | int | float)}
        storage.write(path, "moments", self.tensors(), facts | {"site": dataclasses.asdict(self.site)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what `save` wrote; a file that is not that, whole, is a ValueError."""
        tensors, facts = storage.read(path, "moments")
        try:
            return cls(GrowthSite(**facts.pop("site")), **(facts | tensors))
        except TypeError:
            raise ValueError(f"path: {path} holds moments of another version of growkern; measure them anew") from None


def collect(
    model: nn.Module,
    sites: GrowthSite | Iterable[GrowthSite],
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFn,
    *,
    kernel: str = "full",
    reduction: str = "mean",
    null_draws: int = 16,
    batch_dim: int = 0,
    group: torch.distributed.ProcessGroup | None = None,
) -> dict[str, Moments]:
    """Measure the moments of sites by hooks on ordinary forward and backward passes.

    The model runs in evaluation mode and is left as it was, random number generators too. A second pass over the
    batches, with dW* of the first one known, measures N for ``kernel="full"`` and draws of chance (TINY, section 3); on
    a CPU it reads what the first one has seen, if that is no larger than the moments.

    Parameters
    ----------
    model : nn.Module
        The model.
    sites : GrowthSite or iterable of GrowthSite
        Where to measure.
    batches : iterable of (input, target)
        Read once into a list, and moved to the model's device. An input that is a tuple (or list) holds several
        arguments.
    loss_fn : callable
        ``loss_fn(model(input), target)``, a scalar.
    kernel : {"full", "center"}
        Fan-out of new channels: the consumer's whole kernel, or 1×1 at its centre.
    reduction : {"mean", "sum"}
        How the loss sums over its samples.
    null_draws : int
        Draws of random signs for ``neurons="auto"``, two at least, half of them at wide sites; 0 for none.
    batch_dim : int
        Dimension of the batch in the inputs of the model and in token features: 1 where sequences come first.
    group : torch.distributed.ProcessGroup, optional
        Processes that each measure their own batches of the same model; all get the sums.

    Returns
    -------
    dict of str to Moments
        By name of the site.

    Raises
    ------
    ValueError
        For an argument that is not as described, a site that does not fit the model, no batch, a loss or a
        moment that is not finite, or a site that no gradient reaches.
    """
    check_collected(kernel, reduction, null_draws)
    sites = [sites] if isinstance(sites, GrowthSite) else listed("sites", sites, "growth sites")
    run = Passes(model, batches, loss_fn, reduction, group, batch_dim)
    probes = {probe.site.name: probe for probe in (Probe(model, site, kernel, batch_dim) for site in sites)}
    if not probes:
        raise ValueError("sites: expected at least one growth site, got none")
    if len(probes) < len(sites):
        raise ValueError(f"sites: expected one site for each producer, got {', '.join(site.name for site in sites)}")
    elsewhere = share_uniform(probes.values())
    again = {name: probe for name, probe in probes.items() if null_draws or probe.kernel == "full"}
    recording = Recording(again.values(), null_draws)
    with evaluating(model), torch.enable_grad(), ExitStack() as hooks:
        for probe in probes.values():
            hooks.enter_context(probe.watching())
        sums = run.sweep(probes, measured_together, recording)
        for name, other in elsewhere.items():
            sums[name]["uniform"] = sums[other]["hh"]
        counts = {name: run.total(probe.count) for name, probe in probes.items()}
        pairs = {name: (sums[name]["hh"], sums[name]["hv"]) for name in again}  # of sums as of means
        updates = {name: update.mT for name, update in least_squares(pairs).items()}
        draws = draws_of(again.values(), null_draws, distributed.rank(group))
        second = run.sweep(again, lambda some: residuals_together(some, updates, draws), recording)
    for name, own in draws.items():
        second[name] |= own.made()
    return {
        name: _assemble(probe, counts[name], reduction, sums.pop(name) | second.pop(name, {}), updates.get(name))
        for name, probe in probes.items()
    }


def _assemble(probe: Probe, count: int, reduction: str, sums: dict[str, Tensor], update: Tensor | None) -> Moments:
    producer, consumer, between = probe.layers.producer, probe.layers.consumer, probe.layers.between
    p = producer.weight[0].numel() + (producer.bias is not None)
    means = {}
    if (uniform := sums["xx"] if probe.needs_ones else sums.pop("uniform", None)) is not None:
        positions = uniform[-1, -1]  # the last column is of ones, never pooled
        means = {"x_mean": uniform[:p, -1] / positions, "x_second": uniform[:p, :p] / positions}
    for name, value in sums.items():
        trimmed = value[:p, :p] if name == "xx" else value[:p] if name in ("xh", "xv") else value
        means[name] = trimmed.contiguous().div_(count)
    if probe.kernel == "full":
        means["xh"] = means["null_h"] = None  # type: ignore[assignment]
    fan_out = consumer.weight.detach().reshape(len(consumer.weight), probe.layers.units, -1).transpose(0, 1).flatten(1)
    return Moments(
        site=probe.site,
        kernel=probe.kernel,
        count=count,
        samples=round(count * probe.samples / probe.count),
        reduction=reduction,
        slope=between.slope,
        smooth=between.smooth,
        x_bias=producer.bias is not None,
        h_bias=consumer.bias is not None,
        offsets=means["xv"].shape[1] // max(means["vv"].shape[0], 1),
        multiple=between.multiple,
        unit_parameters=probe.layers.unit_parameters,
        unit_flops=p * probe.hidden_positions + fan_out.shape[1] * probe.output_positions,
        fan_in_norm=float(producer.weight.detach().flatten(1).norm(dim=1).mean()),
        fan_out_norm=float(fan_out.norm(dim=1).mean()),
        update=update,
        **means,
    )
