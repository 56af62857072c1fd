"""A growth step of a plain network in PyTorch alone, as whoever knows it well would write it by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import baselines
import cholesky
import torch
import torch.nn.functional as F
from clock import Clock
from torch import Tensor, nn

import growkern as gk
from growkern import ops
from growkern.backend import use_backend
from growkern.ops import ConvGeometry

Batches = list[tuple[Tensor, Tensor]]
Ways = dict[str, Callable[..., Any]]

NAMES = ("xx", "xh", "xv", "hh", "hv", "vv")


def chunks(op: Callable[..., Any], *args: Tensor, **named: Any) -> Any:
    with use_backend("reference"):
        return op(*args, **named)


ROWS: Ways = {"six products": baselines.six_products, "one product": baselines.one_product}
MAPS: Ways = {
    "shifts by products": partial(baselines.by_shifts, engine="products"),
    "shifts by gradient": partial(baselines.by_shifts, engine="gradient"),
    "unfold": baselines.by_unfold,
    "chunks": partial(chunks, ops.conv2d_moments),
}
RESIDUALS: Ways = {
    "shifts by products": partial(baselines.residual_by_shifts, engine="products"),
    "shifts by gradient": partial(baselines.residual_by_shifts, engine="gradient"),
    "chunks": lambda *args, **named: chunks(ops.conv2d_residual, *args, **named)[0],
}


class PyTorchStep:
    """Statistics in hooks on ordinary passes, then a solve by Cholesky and subspace iteration in float64.

    Statistics are summed in the way that was the fastest for their sizes when these were first met. Without a clock
    they are float64 and serve for reference: what single precision saw and wanted, one product for each shift.
    """

    def __init__(self, model: nn.Module, sites: list[gk.GrowthSite], kernel: str, clock: Clock | None = None) -> None:
        self.model, self.kernel, self.clock = model, kernel, clock
        layers = ((site, (site.producer, site.consumer)) for site in sites)
        self.sites = {site.name: tuple(map(model.get_submodule, names)) for site, names in layers}
        self.fastest: dict[Any, Callable[..., Any]] = {}

    def __call__(self, batches: Batches, neurons: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Fan-in, fan-out and best update of each site."""
        return [
            (*cholesky.best_neurons(cholesky.factor(m["xx"]), m["xr"], neurons, cholesky.by_iteration), m["update"])
            for m in self.measured(batches)
        ]

    def try_ways(self, batches: Batches) -> None:
        """Meet all sizes, of fewer samples than a solve needs."""
        updates = {name: torch.zeros_like(each["hv"]).mT for name, each in self.passes(batches, self.moments).items()}
        if self.kernel == "full":
            self.passes(batches, partial(self.residuals, updates))

    def measured(self, batches: Batches) -> Iterator[dict[str, Tensor]]:
        """Means of each site in float64, dW* and N (as "xr") among them."""
        count = sum(len(x) for x, _ in batches)
        sums = self.passes(batches, self.moments)
        updates = {name: cholesky.best_update(each["hh"].double(), each["hv"].double()) for name, each in sums.items()}
        residuals = self.passes(batches, partial(self.residuals, updates)) if self.kernel == "full" else {}
        for name, update in updates.items():
            found = sums.pop(name) | residuals.pop(name, {})
            m = {key: value.double() / count for key, value in found.items()} | {"update": update}
            yield m if self.kernel == "full" else m | {"xr": m["xv"] - m["xh"] @ update.mT}

    def passes(self, batches: Batches, measure: Callable[..., dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        sums: dict[str, dict[str, Tensor]] = {name: {} for name in self.sites}

        def add(name: str, *operands: Tensor) -> None:
            if self.clock is None:
                operands = tuple(each.double() for each in operands)
            for key, value in measure(name, *operands).items():
                sums[name][key] = sums[name][key].add_(value) if key in sums[name] else value

        for x, y in batches:
            edges: list[Any] = []
            with self.watching(add, len(x), edges):
                # Whatever lies behind the first site's output is visited on the way, and weights get no gradients.
                torch.autograd.grad(F.cross_entropy(self.model(x), y), edges[:1])
        return sums

    @contextmanager
    def watching(self, take: Callable[..., None], images: int, edges: list[Any]) -> Iterator[None]:
        """Hooks that hand x, h and v of a site on as soon as the backward pass has v."""
        handles = []
        for name, (producer, consumer) in self.sites.items():
            seen: dict[str, Tensor] = {}

            def read(_: Any, args: Any, seen: dict[str, Tensor] = seen, key: str = "x") -> None:
                seen[key] = args[0].detach()

            def wrote(_: Any, args: Any, z: Tensor, seen: dict[str, Tensor] = seen, name: str = name) -> None:
                z.register_hook(lambda g: take(name, seen.pop("x"), seen.pop("h"), g * -images))
                edges.append(torch.autograd.graph.get_gradient_edge(z))

            handles += [
                producer.register_forward_pre_hook(read),
                consumer.register_forward_pre_hook(partial(read, key="h")),
                consumer.register_forward_hook(wrote),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def moments(self, name: str, x: Tensor, h: Tensor, v: Tensor) -> dict[str, Tensor]:
        if isinstance(self.sites[name][0], nn.Linear):
            found = self.fastest_of(ROWS, *(t.flatten(0, -2) for t in (x, h, v)), **self.flags(name))
        else:
            found = self.fastest_of(MAPS, x, h, v, **self.flags(name))
        return dict(zip(NAMES, found, strict=True))

    def residuals(self, updates: dict[str, Tensor], name: str, x: Tensor, h: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"xr": self.fastest_of(RESIDUALS, x, h, v, updates[name].to(v.dtype), **self.flags(name))}

    def flags(self, name: str) -> dict[str, Any]:
        producer, consumer = self.sites[name]
        flags: dict[str, Any] = {"x_bias": producer.bias is not None, "h_bias": consumer.bias is not None}
        if isinstance(producer, nn.Conv2d):
            read = [ConvGeometry(c.kernel_size, c.stride, c.padding, c.dilation) for c in (producer, consumer)]
            flags |= {"producer": read[0], "consumer": read[1], "kernel": self.kernel}
        return flags

    def fastest_of(self, ways: Ways, *args: Tensor, **named: Any) -> Any:
        """Run the fastest of some ways; where sizes are new, try each."""
        key = (id(ways), *(t.shape for t in args), *named.values())
        if key not in self.fastest:
            taken = {}
            for way in ways.values():
                run = partial(way, *args, **named)
                taken[way] = min(self.clock.seconds(run) for _ in range(2)) if self.clock else len(taken)
            self.fastest[key] = min(taken, key=taken.__getitem__)
        return self.fastest[key](*args, **named)
