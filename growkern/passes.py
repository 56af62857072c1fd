"""Forward and backward passes over the batches, on which sites are measured."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from growkern import distributed
from growkern.arguments import check_trained, listed
from growkern.batches import device_of, leaves, to_device
from growkern.draws import LEAST_DRAWS
from growkern.eval_mode import evaluating, fixed_norms, same_draws
from growkern.probe import LossFn, Probe, Seen
from growkern.sites import GrowthSite, logger, resolve, survey

_SUMS = 4  # besides draws, in sizes of N: xx, xv, hh and N, about
_TOGETHER_BYTES = 64 * 2**20  # of x, h and v that sites measured in one go may hold on a GPU


class Recording:
    """What sites see in a pass, for another one over the same batches, if it is no larger than what is measured.

    Parameters
    ----------
    probes : iterable of Probe
        Of the sites that the other pass is for.
    draws : int
        How many of chance are to be made of each.
    """

    def __init__(self, probes: Iterable[Probe], draws: int) -> None:
        entries = {probe.site.name: probe.entries for probe in probes}
        self._room = sum(entries.values()) * (_SUMS + min(draws, LEAST_DRAWS))
        self._seen: dict[str, list[tuple[Seen, int, list[int]]]] = {name: [] for name in entries}

    def add(self, name: str, seen: Seen, batch_size: int) -> None:
        """Hold what a site has seen of a batch, or let go of everything."""
        self._room -= seen.numbers if name in self._seen else 0
        if self._room < 0:
            self._seen.clear()
        if name in self._seen:
            self._seen[name].append((seen, batch_size, [each._version for each in seen[:4]]))

    def holds(self, sites: Iterable[str], batches: int) -> bool:
        """Whether it is all there, for so many batches, and no model has written to it."""
        found = [self._seen.get(name, []) for name in sites]
        intact = all([each._version for each in seen[:4]] == versions for all_ in found for seen, _, versions in all_)
        return intact and all(len(all_) == batches for all_ in found)

    def taken(self) -> Iterator[tuple[str, list[tuple[Seen, int]]]]:
        """Let go of it site by site, those first that hold most, before their sums need memory."""
        size = {name: sum(seen.numbers for seen, *_ in all_) for name, all_ in self._seen.items()}
        for name in sorted(size, key=lambda name: -size[name]):
            yield name, [(seen, batch_size) for seen, batch_size, _ in self._seen.pop(name)]


class Passes:
    """Forward and backward passes over the batches; every call of a method draws the same random numbers."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Any]],
        loss_fn: LossFn,
        reduction: str = "mean",
        group: torch.distributed.ProcessGroup | None = None,
        batch_dim: int = 0,
    ) -> None:
        check_trained(model, loss_fn)
        self.model, self.loss_fn, self.reduction = model, loss_fn, reduction
        self.group, self.batch_dim, self.device = group, batch_dim, device_of(model)
        self.batches: list[tuple[Any, Any]] = listed("batches", batches, "(input, target) pairs")
        if self.total(int(not self.batches)):
            raise ValueError("batches: expected at least one (input, target) pair in every process, got none")

    def total(self, number: int) -> int:
        """Sum of one integer over the processes of the group."""
        return distributed.total(number, self.group, self.device)

    def divided(self, share: float) -> tuple[Passes, Passes]:
        """Split into passes over the first batches and over a share of them at the end; one batch serves as both."""
        size = len(self.batches)
        if not share or self.total(int(size < 2)):  # in any process of a group
            return self, self
        first = size - min(max(int(size * share), 1), size - 1)
        measured, held_out = copy.copy(self), copy.copy(self)
        measured.batches, held_out.batches = self.batches[:first], self.batches[first:]
        return measured, held_out

    def sweep(
        self,
        probes: Mapping[str, Probe],
        measure: Callable[[Sequence[Probe]], Sequence[dict[str, Tensor]]],
        recording: Recording,
    ) -> dict[str, dict[str, Tensor]]:
        """Run every batch once, or take it from a recording that holds it; sum up what `measure(probes)` gives.

        Parameters
        ----------
        probes : mapping of str to Probe
            By name of the site.
        measure : callable
            Gives what is to be added up, by name, for each of some probes.
        recording : Recording
            Of the pass before, or for the next one.

        Returns
        -------
        dict of str to dict
            The sums, by site and name.

        Raises
        ------
        ValueError
            For sums, a loss or batches that cannot be used, in any process.
        """
        sums: dict[str, dict[str, Tensor]] = {name: {} for name in probes}
        failure: Exception | None = None

        def add(some: Sequence[Probe]) -> None:
            totals, values = [], []
            for each, measured in zip(some, measure(some), strict=True):
                total = sums[each.site.name]
                for key, value in measured.items():
                    if total.setdefault(key, value) is not value:
                        totals.append(total[key])
                        values.append(value)
                each.held.clear()
            if totals:
                torch._foreach_add_(totals, values)  # one launch for many

        def take(probe: Probe, seen: Seen, batch_size: int) -> None:
            # A site that sees few numbers beside those that it sums up to waits for more batches: to write and add up
            # its sums takes longer than to make them.
            if probe.held and not probe.held[0][0].fits(seen):
                add([probe])
            if probe.hold(seen, batch_size):
                add([probe])

        try:
            if recording.holds(probes, len(self.batches)):
                for name, all_of_it in recording.taken():
                    for seen, batch_size in all_of_it:
                        take(probes[name], seen, batch_size)
            else:
                with same_draws(self.model), fixed_norms(self.model):
                    for number, batch in enumerate(self.batches):
                        self._measure(number, batch, probes, add, take, recording)
            for probe in probes.values():
                if probe.held:
                    add([probe])
        except Exception as error:  # the other processes of a group wait for this one
            failure = error
        failed = self.total(int(failure is not None))
        if failure is not None:
            raise failure
        if failed:
            raise ValueError("batches: another process of the group failed to measure; it says why")
        flat = {(name, key): value for name, values in sums.items() for key, value in values.items()}
        distributed.all_sum(flat.values(), self.group)
        ends = [torch.stack(value.aminmax()) for value in flat.values() if value.numel()]  # in one read, NaN too
        finite = iter(torch.stack([both.isfinite().all() for both in ends]).tolist() if ends else ())
        bad = [f"{key} of site {name!r}" for (name, key), value in flat.items() if value.numel() and not next(finite)]
        if bad:
            raise ValueError(f"batches: {', '.join(bad)} is not finite; look for NaN or Inf in the inputs and weights")
        return sums

    def reached(self, sites: Sequence[GrowthSite]) -> list[GrowthSite]:
        """Sites that the loss of the first batch sends a gradient to."""
        probes = [Probe(self.model, site, "full", self.batch_dim) for site in sites]
        with evaluating(self.model), torch.enable_grad(), ExitStack() as hooks:
            for probe in probes:
                hooks.enter_context(probe.watching())
                probe.forget(lambda _: None)
            loss, _ = self._forward(self.batches[0])
            edges = [(site, probe.edge()) for site, probe in zip(sites, probes, strict=True) if probe.reached]
            found = torch.autograd.grad(loss, [edge for _, edge in edges], allow_unused=True) if edges else ()
        return [site for (site, _), gradient in zip(edges, found, strict=True) if gradient is not None]

    def loss(self) -> float:
        """Loss over the batches: their mean, weighted by length, or their sum."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with same_draws(self.model), torch.no_grad():
            for batch in self.batches:
                args, target = to_device(batch, self.device)
                rows = self._rows(args) if self.reduction == "mean" else 1
                loss = self.loss_fn(self.model(*args), target)
                sums += torch.stack([loss.double().reshape(()) * rows, sums.new_tensor(rows)])
        distributed.all_sum([sums], self.group)
        return float(sums[0] / sums[1] if self.reduction == "mean" else sums[0])

    def _measure(
        self,
        number: int,
        batch: tuple[Any, Any],
        probes: Mapping[str, Probe],
        add: Callable[[Sequence[Probe]], None],
        take: Callable[[Probe, Seen, int], None],
        recording: Recording,
    ) -> None:
        # Every site is measured as soon as the backward pass has reached it, so that what it has seen can go with
        # the graph, and memory peaks where that of the forward pass does.
        together: list[Probe] = []
        unreached = set(probes)

        def arrived(probe: Probe, gradient: Tensor) -> None:
            unreached.discard(probe.site.name)
            try:
                seen = probe.receive(gradient, batch_size, seed, self.reduction == "mean")
            except ValueError as error:
                raise ValueError(f"site {probe.site.name!r}: {error}") from None
            if self.device.type == "cpu":
                recording.add(probe.site.name, seen, batch_size)
                take(probe, seen, batch_size)
                return
            probe.held.append((seen, batch_size))
            together.append(probe)
            if sum(seen.numbers * seen.v.itemsize for probe in together for seen, _ in probe.held) >= _TOGETHER_BYTES:
                add(together)
                together.clear()

        for probe in probes.values():
            probe.forget(functools.partial(arrived, probe))
        loss, batch_size = self._forward(batch)
        if not loss.isfinite():
            raise ValueError(f"loss_fn: gave {loss.item()} on batch {number}; nothing was measured")
        # Scaled up front, by a power of two, so that half precision neither underflows nor rounds on the way back.
        seed = float(2 ** (min(batch_size, 2**12).bit_length() - 1))
        edges = [probe.edge() for probe in probes.values()]
        torch.autograd.grad(loss, _lowest(edges), torch.full_like(loss, seed), allow_unused=True)
        if unreached:
            name = next(name for name in probes if name in unreached)
            consumer = probes[name].site.consumer
            raise ValueError(f"site {name!r}: no gradient reaches {consumer}; the loss does not use it")
        if together:
            add(together)

    def _forward(self, batch: tuple[Any, Any]) -> tuple[Tensor, int]:
        args, target = to_device(batch, self.device)
        loss = self.loss_fn(self.model(*args), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: expected a scalar tensor, got {got}")
        if not loss.requires_grad:
            raise ValueError("loss_fn: no gradient flows from the loss to the model; is everything frozen?")
        if not (rows := self._rows(args)):
            raise ValueError("batches: expected samples in every batch, got an empty one")
        return loss, rows

    def _rows(self, args: tuple[Any, ...]) -> int:
        """Images or sequences of a batch: the size of its first tensor along the batch dimension."""
        for tensor in leaves(args):
            if not -tensor.dim() <= self.batch_dim < tensor.dim():
                shape = tuple(tensor.shape)
                raise ValueError(f"batch_dim: expected a dimension of an input of shape {shape}, got {self.batch_dim}")
            return tensor.shape[self.batch_dim]
        raise ValueError("batches: expected a tensor among the inputs of the model, got none")


def _lowest(edges: Sequence[Any]) -> list[Any]:
    """Edges of a graph from which no other one is reached: a backward pass to them visits all and holds few."""
    nodes = {edge.node for edge in edges}
    above: dict[Any, bool] = {}  # whether a node or one behind it is that of an edge
    stack = [(node, False) for node in nodes]
    while stack:
        node, seen = stack.pop()
        behind = [each for each, _ in node.next_functions if each is not None]
        if seen:
            above[node] = any(each in nodes or above[each] for each in behind)
        elif node not in above:
            above[node] = False
            stack.append((node, True))
            stack.extend((each, False) for each in behind if each not in above)
    return [edge for edge in edges if not above[edge.node]]


def reachable_sites(passes: Passes, kernel: str) -> list[GrowthSite]:
    """Sites of a model that the loss sends a gradient to, and to which `kernel` applies; none is a ValueError."""
    found, reasons = survey(passes.model, to_device(passes.batches[0], passes.device)[0])
    if kernel == "center":
        whole = [site for site in found if resolve(passes.model, site).between.flatten]
        found = [site for site in found if site not in whole]
        reasons += [f"{site}: kernel='center' has no meaning where a consumer reads a whole map" for site in whole]
    reached = passes.reached(found) if found else []
    for site in found:
        if site not in reached:
            reasons.append(f"{site}: no gradient of the loss reaches it")
            logger.info("left out: %s", reasons[-1])
    if not reached:
        why = "; ".join(reasons) or "no Linear or Conv2d alone reads another's through activations, norms and pooling"
        raise ValueError(f"model: found no site that can grow: {why}")
    return reached
