"""WHEN to grow: one growth step is measure, solve, choose, line search, widen."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from growkern import distributed
from growkern.amplitude import best_amplitude
from growkern.arguments import check_choice, check_collected, check_count, check_share, check_trained, listed
from growkern.eval_mode import evaluating
from growkern.moments import Moments, collect
from growkern.neurons import METHODS, NewNeurons, check_options, granularity, solve
from growkern.passes import Passes, reachable_sites
from growkern.probe import LossFn
from growkern.sites import GrowthSite, resolve
from growkern.surgery import apply, trial


@dataclass(frozen=True)
class GrowthEvent:
    """What one growth step did.

    Attributes
    ----------
    site : str
        Name of the site that was chosen; several are joined by commas.
    neurons : int
        Units that were added; 0 if growth was rejected.
    scale : float
        Amplitude γ at which they were added.
    accepted : bool
        Whether the model changed; if not, `reason` says why.
    loss_before, loss_after : float
        On the batches that the amplitude was chosen on, in evaluation mode.
    bottleneck, removed, gain : float
        As in `NewNeurons`, for the site that was chosen; 0 where none was measured.
    widths : dict of str to int
        Units of every site after the step.
    bottlenecks : dict of str to float
        Ψ of every site that was measured: those that the budgets leave room at.
    seconds : float
        Wall time of the step.
    parts : tuple of GrowthEvent
        One for each site, with ``where="all"``.
    """

    site: str
    neurons: int
    scale: float
    accepted: bool
    loss_before: float
    loss_after: float
    bottleneck: float
    removed: float
    gain: float
    widths: dict[str, int]
    bottlenecks: dict[str, float]
    seconds: float
    reason: str = ""
    parts: tuple[GrowthEvent, ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return "\n".join(map(str, self.parts))
        if not self.accepted:
            return f"{self.site or 'no site'}: not grown, {self.reason} ({self.seconds:.2f} s)"
        return (
            f"{self.site}: +{self.neurons} -> {self.widths[self.site]} units at scale {self.scale:g}, "
            f"loss {self.loss_before:.4g} -> {self.loss_after:.4g} ({self.seconds:.2f} s)"
        )


class Grower:
    """Grows a model inside its own training loop, one `step` at a time.

    Parameters
    ----------
    model : nn.Module
        A plain model.
    optimizer : torch.optim.Optimizer or None
        What trains it; its parameter groups and state follow every growth.
    loss_fn : callable
        ``loss_fn(model(input), target)``, a scalar.
    sites : sequence of GrowthSite, optional
        Where it may grow; by default what `find_sites` finds with the first batch.
    method, neurons, paired, max_neurons
        As in `solve`; an integer is rounded up to what a site can grow by (± pairs, groups of a GroupNorm).
    where : {"best", "all"}
        The site that promises most per unit of cost, or every site in turn, measured anew for each.
    when : {"always", "pays"} or collection of int
        Epochs at which `due` says to grow; with "pays", a step grows only where the new weights remove more of
        the desired change per parameter than the consumer's existing ones still can.
    kernel, reduction, null_draws, batch_dim, group
        As in `collect`.
    update : bool
        Also apply dW* when growing.
    cost : {"parameters", "flops"}
        What a promise is divided by.
    max_parameters : int, optional
        Never grow the model beyond this many parameters.
    held_out : float
        Share of the batches of a step that are not measured, so that the amplitude is chosen on samples that the
        neurons were not fitted to; with 0, or one batch, on the same. Methods that start at zero measure them all.

    Notes
    -----
    A DistributedDataParallel wrapper holds the old parameters: grow its inner module, then build the wrapper anew.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        loss_fn: LossFn,
        *,
        sites: Sequence[GrowthSite] | None = None,
        method: str = "tiny",
        neurons: int | str = "auto",
        where: str = "best",
        when: str | Collection[int] = "always",
        kernel: str = "full",
        paired: bool = False,
        update: bool = False,
        cost: str = "parameters",
        max_neurons: int | None = None,
        max_parameters: int | None = None,
        held_out: float = 0.25,
        reduction: str = "mean",
        null_draws: int = 16,
        batch_dim: int = 0,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        check_trained(model, loss_fn, optimizer)
        check_options(method, neurons, max_neurons)
        check_choice("where", where, ("best", "all"))
        check_choice("cost", cost, ("parameters", "flops"))
        check_collected(kernel, reduction, null_draws)
        check_count("max_parameters", 0 if max_parameters is None else max_parameters)
        check_share("held_out", held_out)
        if not isinstance(when, Collection):
            raise ValueError(f"when: expected 'always', 'pays' or a collection of epochs, got {when!r}")
        if isinstance(when, str):
            check_choice("when", when, ("always", "pays"))
        if when == "pays" and METHODS[method].starts_at_zero != "neither":
            raise ValueError(f"when: 'pays' compares what neurons remove at once; those of {method!r} start at zero")
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.where, self.when, self.update, self.cost = where, when, update, cost
        self.max_neurons, self.max_parameters = max_neurons, max_parameters
        self.sites = None if sites is None else listed("sites", sites, "a list of growth sites")
        self._method, self._neurons, self._paired = method, neurons, paired
        self._held_out = held_out if METHODS[method].starts_at_zero == "neither" else 0.0
        self._passes: dict[str, Any] = {"reduction": reduction, "group": group, "batch_dim": batch_dim}
        draws = null_draws * (neurons == "auto")
        self._collect: dict[str, Any] = {"kernel": kernel, "null_draws": draws, **self._passes}
        self._turn = 0

    def due(self, epoch: int) -> bool:
        """Whether the schedule has a growth step at this epoch."""
        return isinstance(self.when, str) or epoch in self.when

    def locate(self, batches: Iterable[tuple[Any, Any]]) -> list[GrowthSite]:
        """Find the sites that it may grow, unless they were given or found; `step` does so by itself."""
        return self._located(Passes(self.model, batches, self.loss_fn, **self._passes))

    def state_dict(self) -> dict[str, Any]:
        """Give what the next step depends on besides model and optimizer, as plain data."""
        return {"turn": self._turn, "sites": [dataclasses.asdict(site) for site in self.sites or ()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the grower did whose `state_dict` this is."""
        try:
            sites = [GrowthSite(**each) for each in state["sites"]]
            self._turn, self.sites = state["turn"], sites or self.sites
        except (KeyError, TypeError):
            raise ValueError("state: expected what Grower.state_dict gives, got something else") from None

    def step(self, batches: Iterable[tuple[Any, Any]]) -> GrowthEvent:
        """Grow once: measure, solve, choose, line-search, widen.

        Parameters
        ----------
        batches : iterable of (input, target)
            Read once into a list; as in `collect`. The first ones are measured, the last ones held out.

        Returns
        -------
        GrowthEvent
            What happened. After a rejection model and optimizer are bit-identical to before, and so they are after
            an error, but for sites that ``where="all"`` had already grown.

        Raises
        ------
        ValueError
            As `collect` and `solve` do, or if the model has no site that can grow.
        """
        passes, search = Passes(self.model, batches, self.loss_fn, **self._passes).divided(self._held_out)
        sites = self._located(passes)
        if self.where == "best" and self._method == "random":
            sites, self._turn = [sites[self._turn % len(sites)]], self._turn + 1
        if self.where == "best":
            return self._grow(sites, passes, search)
        parts = tuple(self._grow([site], passes, search) for site in sites)
        totals = {name: sum(getattr(p, name) for p in parts) for name in ("neurons", "bottleneck", "removed", "gain")}
        grown = [part for part in parts if part.accepted]
        return dataclasses.replace(
            parts[-1],
            site=", ".join(part.site for part in grown),
            scale=grown[-1].scale if grown else 0.0,
            accepted=bool(grown),
            loss_before=parts[0].loss_before,
            bottlenecks={name: value for part in parts for name, value in part.bottlenecks.items()},
            seconds=sum(part.seconds for part in parts),
            parts=parts,
            **totals,
        )

    def _located(self, passes: Passes) -> list[GrowthSite]:
        if self.sites is None:
            self.sites = reachable_sites(passes, self._collect["kernel"])
        if not self.sites:
            raise ValueError("sites: expected at least one growth site, got none")
        return self.sites

    def _grow(self, sites: Sequence[GrowthSite], passes: Passes, search: Passes) -> GrowthEvent:
        """One growth at the best of some sites: measured on the one, its amplitude chosen on the other passes."""
        start, name, scale = time.perf_counter(), sites[0].name, 0.0
        if not (sites := [site for site in sites if self._room(site) != 0]):
            with evaluating(self.model):
                loss, seconds = search.loss(), time.perf_counter() - start
            reason = "the budget of parameters or neurons is spent"
            return GrowthEvent(name, 0, scale, False, loss, loss, 0.0, 0.0, 0.0, self._widths(), {}, seconds, reason)
        moments = collect(self.model, sites, passes.batches, self.loss_fn, **self._collect)
        found = self._solve(moments)
        name, new, reason = distributed.agree(self._choose(moments, found), passes.group)
        with evaluating(self.model):
            before = after = search.loss()
            if not reason:
                scale, after = self._line_search(new, search, before)
                reason = "" if scale else "no amplitude lowers the loss"
        if scale:
            apply(self.model, new, scale=scale, update=self.update, optimizer=self.optimizer)
        return GrowthEvent(
            site=name,
            neurons=len(new) if scale else 0,
            scale=scale,
            accepted=bool(scale),
            loss_before=before,
            loss_after=after,
            bottleneck=new.bottleneck,
            removed=new.removed,
            gain=new.gain,
            widths=self._widths(),
            bottlenecks={name: each.bottleneck for name, each in found.items()},
            seconds=time.perf_counter() - start,
            reason=reason,
        )

    def _solve(self, moments: dict[str, Moments]) -> dict[str, NewNeurons]:
        """Neurons of every site; those that may grow by as much are solved together."""
        alike: dict[tuple[int | str, int | None], dict[str, Moments]] = {}
        for name, each in moments.items():
            unit = granularity(each, self._method, self._paired)
            count = self._neurons if isinstance(self._neurons, str) else -(-self._neurons // unit) * unit
            alike.setdefault((count, self._room(each.site)), {})[name] = each
        found: dict[str, NewNeurons] = {}
        for (count, room), group in alike.items():
            found |= solve(group, method=self._method, neurons=count, max_neurons=room, paired=self._paired)
        return {name: found[name] for name in moments}

    def _room(self, site: GrowthSite) -> int | None:
        """Units that the budgets leave room for at a site, in multiples of what it grows by."""
        layers, rooms = resolve(self.model, site), [] if self.max_neurons is None else [self.max_neurons]
        if self.max_parameters is not None:
            left = self.max_parameters - sum(p.numel() for p in self.model.parameters())
            rooms.append(max(left // layers.unit_parameters, 0))
        unit = granularity(layers.between, self._method, self._paired)
        return min(rooms) // unit * unit if rooms else None

    def _widths(self) -> dict[str, int]:
        return {site.name: resolve(self.model, site).units for site in self.sites or ()}

    def _choose(self, moments: dict[str, Moments], found: dict[str, NewNeurons]) -> tuple[str, NewNeurons, str]:
        """Name and neurons of the site that promises most per unit of cost, and the reason not to grow, if any."""

        def promise(name: str) -> float:
            new, each = found[name], moments[name]
            if not len(new):
                return -math.inf
            by_square = new.method == "gradmax"  # it starts at zero: its gain is yet to come
            value = float(new.singular_values.square().sum()) if by_square else new.gain
            return value / (len(new) * (each.unit_parameters if self.cost == "parameters" else each.unit_flops))

        name = max(found, key=promise)
        if not len(found[name]):
            above = "no neuron stands above chance" if self._neurons == "auto" else "no direction is left to add"
            above = above if any(new.bottleneck + new.reachable for new in found.values()) else "all gradients are zero"
            few = any(found[n].noise == math.inf or m.samples <= len(m.hh) for n, m in moments.items())
            return name, found[name], above + "; samples are few for what layers read: give more batches" * few
        if self.when == "pays":
            paying = [n for n, new in found.items() if len(new) and _pays(moments[n], new)]
            if not paying:
                return name, found[name], "training on pays more"
            name = max(paying, key=promise)
        return name, found[name], ""

    def _line_search(self, new: NewNeurons, passes: Passes, at_zero: float) -> tuple[float, float]:
        """Amplitude with the least loss, and that loss; amplitude 0 if none is below the loss at 0."""

        def loss(scale: float) -> float:
            with trial(self.model, new, scale=scale, update=self.update):
                value = passes.loss()
            return value if math.isfinite(value) else math.inf

        if METHODS[new.method].starts_at_zero != "neither":
            return 1.0, loss(1.0)
        return best_amplitude(loss, at_zero)


def _pays(moments: Moments, new: NewNeurons) -> bool:
    """Whether new weights remove more per parameter than the consumer's existing ones still can."""
    return new.removed * new.best_update.numel() > new.reachable * len(new) * moments.unit_parameters
