"""What sites see in forward and backward passes: x, h and v, caught by hooks and handed to the ops."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growkern import ops
from growkern.between import Pool
from growkern.draws import Draws, Part, joined_parts, rows_per_sign
from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, Residual
from growkern.sites import GrowthSite, resolve

LossFn = Callable[[Any, Any], Tensor]


def measured_together(probes: Sequence[Probe]) -> list[dict[str, Tensor]]:
    """Sum up the six moments of sites together, and "uniform", those of x with ones, where a norm lies between."""
    calls = [probe.calls() for probe in probes]
    found = iter(ops.moments.grouped_moments([call for each in calls for call in each.values()]))
    names, sums = ("xx", "xh", "xv", "hh", "hv", "vv"), []
    for each in calls:
        sums.append(dict(zip(names, next(found), strict=True)))
        if "uniform" in each:
            sums[-1]["uniform"] = next(found)[0]
    return sums


def residuals_together(
    probes: Sequence[Probe], updates: Mapping[str, Tensor], draws: Mapping[str, Draws]
) -> list[dict[str, Tensor]]:
    """Sum up N of sites together, with v⊥ = v − update·h, and add to the sums behind their draws, which come along."""
    found: list[dict[str, Tensor]] = [{} for _ in probes]
    queues = []
    for sums, probe in zip(found, probes, strict=True):
        own = draws.get(probe.site.name)
        queues.append([(sums, own, *each) for each in probe.residuals(updates[probe.site.name], own)])
    for some in itertools.zip_longest(*queues):  # a part of each at a time: what it gives is as large as N
        calls = [each for each in some if each is not None]
        totals, values = [], []
        for (sums, own, number, _), (xr, *null) in zip(
            calls, ops.moments.grouped_residuals([call for *_, call in calls]), strict=True
        ):
            if sums.setdefault("xr", xr) is not xr:
                totals.append(sums["xr"])
                values.append(xr)
            if own is not None:
                totals += own.places(number, *null)
                values += null
                sums |= own.sums
        if totals:
            torch._foreach_add_(totals, values)
    return found


def share_uniform(probes: Collection[Probe]) -> dict[str, str]:
    """Find the sites whose "uniform" another site measures as its hh, and let it be summed up there only.

    Returns
    -------
    dict of str to str
        By name of the site, that of the other one.
    """
    readers = {probe.layers.consumer: probe for probe in probes if probe.layers.consumer.bias is not None}
    found = {}
    for probe in probes:
        reader = readers.get(probe.layers.producer)
        if probe.wants_uniform and reader is not None and not probe.layers.between.pools_before_norm:
            found[probe.site.name] = reader.site.name
            probe.wants_uniform = False
    return found


def draws_of(probes: Iterable[Probe], number: int, seed: int) -> dict[str, Draws]:
    """Prepare `number` draws of each site after the first pass, which has counted its rows; no draws for 0."""
    return {probe.site.name: Draws(number, probe.entries, probe.count, seed) for probe in probes if number}


class Seen(NamedTuple):
    """What a site sees of some samples: x, ahead of its pools too, h and v; and how the ops take them."""

    x: Tensor
    raw: Tensor
    h: Tensor
    v: Tensor
    flags: dict[str, Any]

    @property
    def numbers(self) -> int:
        """Entries of x, h and v."""
        return self.x.numel() + self.h.numel() + self.v.numel()

    def fits(self, other: Seen) -> bool:
        """Whether other samples can be put behind these."""
        pairs = zip(self[:4], other[:4], strict=True)
        return self.flags == other.flags and all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in pairs)

    def kept(self) -> Seen:
        """Give the same in memory that the model does not write to again."""
        raw = self.raw.clone()
        return self._replace(x=raw if self.x is self.raw else self.x, raw=raw, h=self.h.clone())

    def call(self, **flags: bool) -> Call:
        """Ask for the moments."""
        return Call(self.x, self.h, self.v, **self.flags | flags)


def joined(some: Sequence[Seen]) -> Seen:
    """Put samples behind each other that fit."""
    if len(some) == 1:
        return some[0]
    raw, h, v = (torch.cat(each) for each in zip(*(seen[1:4] for seen in some), strict=True))
    x = raw if some[0].x is some[0].raw else torch.cat([seen.x for seen in some])
    return Seen(x, raw, h, v, some[0].flags)


class Probe:
    """Hooks on the two layers of one site.

    Attributes
    ----------
    kernel : str
        "linear", "full" or "center".
    count, samples : int
        Images or rows of the calls so far, and samples of h in them.
    hidden_positions, output_positions : int
        Sizes of the producer's and the consumer's output maps; 1 for linear layers.
    wants_uniform : bool
        Whether what a norm between the layers has to undo takes a moment of its own.
    held : list of (Seen, int)
        What is not summed up yet, batch by batch, and images or sequences of the model in it.
    """

    def __init__(self, model: nn.Module, site: GrowthSite, kernel: str, batch_dim: int = 0) -> None:
        self.site, self.layers = site, resolve(model, site)
        self.kernel = kernel if isinstance(self.layers.producer, nn.Conv2d) else "linear"
        if kernel == "center" and self.layers.between.flatten:
            raise ValueError(
                f"kernel: 'center' has no meaning for site {site.name!r}, whose consumer reads a whole map"
            )
        self.count, self.samples, self._batch_dim = 0, 0, batch_dim
        self.hidden_positions = self.output_positions = 1
        self._all_once = self.kernel == "linear" or (self.kernel == "center" and _reads_all_once(self.layers.consumer))
        self.wants_uniform = self.layers.between.norm is not None and not self.needs_ones
        self.held: list[tuple[Seen, int]] = []
        self.forget()

    def forget(self, arrived: Callable[[Tensor], None] | None = None) -> None:
        """Drop what the last pass has left; hand ∂L/∂z of the next one to `arrived` as soon as it is known."""
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._edge: Any = None
        self._arrived = arrived
        self._listening = arrived is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the hooks in place for the duration of a with block."""

        def reads(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if self._listening:
                    self._see(name, args[0] if args else kwargs["input"])

            return hook

        def writes(_: nn.Module, args: tuple[Any, ...], z: Tensor) -> None:
            if self._listening and z.requires_grad:
                self._edge = torch.autograd.graph.get_gradient_edge(z)
                arrived = self._arrived
                # A loss may differentiate by itself, as gradient penalties do: that is not the gradient wanted.
                z.register_hook(lambda gradient: None if self._listening else arrived(gradient))

        handles = [
            self.layers.producer.register_forward_pre_hook(reads("x"), with_kwargs=True),
            self.layers.consumer.register_forward_pre_hook(reads("h"), with_kwargs=True),
            self.layers.consumer.register_forward_hook(writes, prepend=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.forget()
            self.held.clear()

    def _see(self, name: str, value: Tensor) -> None:
        if name in self._seen:
            raise ValueError(f"site {self.site.name!r}: its layers are called more than once in one forward pass")
        self._seen[name] = (value.detach(), value._version)

    @property
    def reached(self) -> bool:
        """Whether the last forward pass called both layers, with a gradient to the consumer's output."""
        return self._seen.keys() == {"x", "h"} and self._edge is not None

    def edge(self) -> Any:
        """Where in the graph of the last forward pass the consumer's output is; stop listening."""
        self._listening = False  # checkpointed layers run again in the backward pass
        if self._seen.keys() != {"x", "h"}:
            raise ValueError(f"site {self.site.name!r}: the forward pass did not call both of its layers")
        if self._edge is None:
            raise ValueError(
                f"site {self.site.name!r}: no gradient flows to {self.site.consumer}; is everything frozen, or in "
                "torch.utils.checkpoint without use_reentrant=False?"
            )
        return self._edge

    def receive(self, gradient: Tensor, batch_size: int, seed: float, mean: bool) -> Seen:
        """Take ∂L/∂z, times `seed`, and make x, h and v of it."""
        for name, (value, version) in self._seen.items():
            if value._version != version:
                raise ValueError(f"{name} was changed in place after its layer had read it")
        x, h, v = self._seen["x"][0], self._seen["h"][0], gradient
        dtype = torch.promote_types(torch.promote_types(x.dtype, h.dtype), v.dtype)
        x, h, v = x.to(dtype), h.to(dtype), v.to(dtype)
        self.forget()
        producer, consumer = self.layers.producer, self.layers.consumer
        flags: dict[str, Any] = {"x_bias": producer.bias is not None, "h_bias": consumer.bias is not None}
        if isinstance(producer, nn.Linear):
            x, h, v = (self._as_rows(t) for t in (x, h, v))
            raw = x
            self.hidden_positions = self.output_positions = max(len(x) // batch_size, 1)
        else:
            if x.dim() != 4:
                raise ValueError(
                    f"{self.site.producer} reads an input of shape {tuple(x.shape)}; expected (B, C, H, W)"
                )
            raw = x
            x, geometry, flags["x_bias"], size = self._hidden(x, self.layers.between.pools)
            if h[0].numel() != self.layers.units * size[0] * size[1] or (h.dim() == 4 and h.shape[2:] != size):
                name = self.site.consumer
                raise ValueError(
                    f"{name} reads {tuple(h.shape)}, which is not what its `between` makes of {tuple(x.shape)}"
                )
            if isinstance(consumer, nn.Linear):
                h, v = h.reshape(len(h), -1, *size), v[:, :, None, None]
                reads = ConvGeometry(size)
            else:
                reads = _geometry(consumer)
            flags |= {"producer": geometry, "consumer": reads, "kernel": self.kernel}
            self.output_positions = v.shape[2] * v.shape[3]
        return Seen(x, raw if self.wants_uniform else x, h, v * (-len(x) / seed if mean else -1 / seed), flags)

    def hold(self, seen: Seen, batch_size: int) -> bool:
        """Hold what is seen of a batch; tell whether all that is held is as many numbers by now as N has."""
        self.held.append((seen, batch_size))
        if sum(each.numbers for each, _ in self.held) >= self.entries:
            return True
        self.held[-1] = seen.kept(), batch_size
        return False

    def _as_rows(self, t: Tensor) -> Tensor:
        """Features as rows (n, features), those of one image or sequence side by side."""
        return t.movedim(self._batch_dim, 0).reshape(-1, t.shape[-1]) if t.dim() > 2 else t.reshape(-1, t.shape[-1])

    def calls(self) -> dict[str, Call]:
        """Count what is held, and give what to sum up of it.

        Returns
        -------
        dict of str to Call
            "moments", and "uniform" where that of a norm is not among them.
        """
        seen = joined([each for each, _ in self.held])
        self.count += len(seen.x)
        self.samples += len(seen.x) * seen.v.shape[2:].numel()
        calls = {"moments": seen.call(x_bias=True) if self.needs_ones else seen.call()}
        if self.wants_uniform:
            calls["uniform"] = self._uniform(seen)
        return calls

    @property
    def needs_ones(self) -> bool:
        """Whether xx, completed by a column of ones, also tells what a norm between the layers has to undo."""
        between = self.layers.between
        return self._all_once and between.norm is not None and between.pools_before_norm == len(between.pools)

    @property
    def entries(self) -> int:
        """Entries of N, without biases."""
        producer, consumer = self.layers.producer, self.layers.consumer
        outputs = len(consumer.weight) if self.kernel == "center" else consumer.weight.numel() // self.layers.units
        return producer.weight[0].numel() * outputs

    def residuals(self, update: Tensor, draws: Draws | None) -> Iterator[tuple[int, Residual]]:
        """Give what to sum up for N of what is held, with random signs by class of samples if there are draws."""
        seen = joined([each for each, _ in self.held])
        if draws is None:
            yield 0, Residual(seen.call(), update)
            return
        linear = self.kernel == "linear"
        for number, rows, signs, run in joined_parts(self._parts(draws)):
            if not linear:  # an image is worth a sign of its own
                signs = signs.repeat_interleave(run, dim=1)[:, : rows.stop - rows.start]
            signs = signs.to(update.device, non_blocking=True)
            call = Call(seen.x[rows], seen.h[rows], seen.v[rows], **seen.flags)
            yield number, Residual(call, update, signs, run if linear else 1)

    def _parts(self, draws: Draws) -> Iterator[Part]:
        begun = 0
        for each, batch_size in self.held:
            run = rows_per_sign(len(each.x), batch_size, self.count if self.kernel == "linear" else 0)
            for part in draws.parts(len(each.x), run):
                yield part._replace(rows=slice(begun + part.rows.start, begun + part.rows.stop))
            begun += len(each.x)

    def _uniform(self, seen: Seen) -> Call:
        if self.kernel == "linear":
            return Call(seen.x, seen.x[:, :0], seen.x[:, :0], x_bias=True)
        between = self.layers.between
        x, geometry, _, size = self._hidden(seen.raw, between.pools[: between.pools_before_norm])
        nothing = x.new_empty(len(x), 0, *size)
        return Call(x, nothing, nothing, geometry, ConvGeometry(1), x_bias=True)

    def _hidden(self, x: Tensor, pools: list[Pool]) -> tuple[Tensor, ConvGeometry, bool, tuple[int, int]]:
        """Give a map and a geometry whose patches are the producer's, averaged by the pools in turn.

        Averaging commutes with the convolution: where one pool of equal windows follows a convolution of stride
        1, the map is averaged at stride 1 and the geometry strides; otherwise patches are formed and pooled.

        Returns
        -------
        tuple
            The map (B, C, H, W), the geometry, whether a virtual column of ones completes its patches, and the
            size of the hidden map after the pools.
        """
        producer = self.layers.producer
        assert isinstance(producer, nn.Conv2d)
        geometry, ones = _geometry(producer), producer.bias is not None
        size = (x.shape[2], x.shape[3]) if producer.padding == "same" else geometry.output_size(*x.shape[2:])
        self.hidden_positions = size[0] * size[1]
        map_size = size
        windows = []
        for pool in pools:
            window = pool.window(*size)
            if window != ((1, 1), (1, 1)):
                windows.append((pool, window))
            size = _pooled(pool, size)
        if not windows:
            return x, geometry, ones, size
        x = F.pad(x, _surround(producer))
        geometry = dataclasses.replace(geometry, padding=(0, 0))
        only = windows[0][1] if len(windows) == 1 else None
        if only is not None and geometry.stride == (1, 1):
            return _averaged(x, only[0]), dataclasses.replace(geometry, stride=only[1]), ones, size
        patches = F.unfold(x, geometry.kernel_size, geometry.dilation, 0, geometry.stride).unflatten(2, map_size)
        if ones:
            patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
        for pool, _ in windows:
            patches = pool.average(patches)
        return patches, ConvGeometry(1), False, size


def _reads_all_once(consumer: nn.Module) -> bool:
    """Whether the centre of a convolution's kernel reads every position of its input once."""
    if not isinstance(consumer, nn.Conv2d):
        return False
    reads = _geometry(consumer)
    taps = zip(reads.kernel_size, reads.dilation, reads.padding, strict=True)
    return reads.stride == (1, 1) and all(k % 2 and padding == d * (k // 2) for k, d, padding in taps)


def _averaged(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Average every window of a map at stride 1, as sums of shifted maps: on a CPU a tenth of `avg_pool2d`'s time."""
    for dim, length in zip((2, 3), window, strict=True):
        count = x.shape[dim] - length + 1
        shifted = [x.narrow(dim, shift, count) for shift in range(length)]
        x = functools.reduce(torch.add, shifted)
    return x.div_(math.prod(window))


def _pooled(pool: Pool, size: tuple[int, int]) -> tuple[int, int]:
    height, width = pool.average(torch.empty(1, 1, *size, device="meta")).shape[2:]
    return height, width


def _surround(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros that a convolution adds to the left, right, top and bottom."""
    if layer.padding == "same":
        (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
        rows, columns = dh * (kh - 1), dw * (kw - 1)
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    top, left = (0, 0) if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1])
    return left, left, top, top


def _geometry(layer: nn.Conv2d) -> ConvGeometry:
    left, _, top, _ = _surround(layer)
    return ConvGeometry(layer.kernel_size, layer.stride, (top, left), layer.dilation)
