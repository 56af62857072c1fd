"""gromo's tensor statistics as moments: x is the input of the previous module, h a module's own, v its gradient.

gromo calls them S (hh), M (hv), the gradient covariance (vv), M_prev (xv), the cross covariance (xh) and S of
growth (xx, or hh of the previous module). They are sums over a batch; where they carry a bias, h and x end in a
one, as in `growkern.ops`. What a batch lacks, or what has another form than expected, is `NotCovered`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from growkern import ops
from growkern.gromo.products import cross_covariance, patch_products
from growkern.ops import ConvGeometry

__all__ = ["NAMES", "Batch", "Conv2dBatch", "LinearBatch", "NotCovered", "Shared", "need"]

# gromo's methods, and those of a batch that stand for them.
NAMES = {
    "compute_s_update": "s",
    "compute_m_update": "m",
    "compute_covariance_loss_gradient_update": "e",
    "compute_m_prev_update": "m_prev",
    "compute_cross_covariance_update": "p",
    "compute_s_growth_update": "s_growth",
}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ONE = ConvGeometry(1)


class NotCovered(Exception):
    """A batch that is left to gromo's own code."""


def need(condition: bool) -> None:
    """Raise NotCovered unless a condition holds.

    Parameters
    ----------
    condition : bool
        What growkern's ops take for granted.

    Raises
    ------
    NotCovered
        If it does not hold.
    """
    if not condition:
        raise NotCovered


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring floating-point tensors of one device to one dtype."""
    first = tensors[0]
    need(all(t.dtype in _FLOATS and t.device == first.device for t in tensors))
    if all(t.dtype == first.dtype for t in tensors):
        return tensors
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


class Batch(ABC):
    """What a growing module has stored of the last batch.

    Parameters
    ----------
    module : GrowingModule
        The consumer; its `previous_module`, if that is of the same kind, is the producer.
    kind : type
        The kind: LinearGrowingModule or Conv2dGrowingModule.
    """

    def __init__(self, module: Any, kind: type) -> None:
        self.module, self.kind = module, kind

    @property
    def previous(self) -> Any:
        """The producer."""
        previous = self.module.previous_module
        need(isinstance(previous, self.kind))
        return previous

    def input_of(self, module: Any) -> Tensor:
        """Input that a module has stored."""
        try:
            stored = module.input
        except (AssertionError, ValueError, AttributeError):
            raise NotCovered from None
        need(isinstance(stored, Tensor))
        return stored

    def gradient(self, desired: Tensor | None) -> Tensor:
        """Gradient of the module's pre-activation, or what is given in its place."""
        if desired is None:
            try:
                desired = self.module.pre_activity.grad
            except (AssertionError, ValueError, AttributeError):
                raise NotCovered from None
        if not isinstance(desired, Tensor):
            raise NotCovered
        return desired

    @abstractmethod
    def joint(self) -> dict[tuple[int, str], tuple[Tensor, int]]:
        """All statistics of the batch that one op gives, under the id of their module and their name."""


class LinearBatch(Batch):
    """Rows of a LinearGrowingModule; leading dimensions count as one, as in gromo."""

    def s(self) -> tuple[Tensor, int]:
        """Σ h hᵀ."""
        (h,) = _alike(_rows(stored := self.input_of(self.module)))
        return ops.linear_moments(h, h[:, :0], h[:, :0], x_bias=self.module.use_bias)[0], len(stored)

    def m(self, desired_activation: Tensor | None = None) -> tuple[Tensor, int]:
        """Σ h vᵀ."""
        stored = self.input_of(self.module)
        return _row_products(stored, self.gradient(desired_activation), self.module.use_bias), len(stored)

    def e(self) -> tuple[Tensor, int]:
        """Σ v vᵀ."""
        (v,) = _alike(_rows(gradient := self.gradient(None)))
        return ops.linear_moments(v, v[:, :0], v[:, :0])[0], len(gradient)

    def m_prev(self, desired_activation: Tensor | None = None) -> tuple[Tensor, int]:
        """Σ x vᵀ."""
        v = self.gradient(desired_activation)
        return _row_products(self.input_of(self.previous), v, self.previous.use_bias), len(v)

    def p(self) -> tuple[Tensor, int]:
        """Σ x hᵀ."""
        x, stored = self.input_of(self.previous), self.input_of(self.module)
        x, h = _alike(_rows(x), _rows(stored))
        need(len(x) == len(h))
        biases = {"x_bias": self.previous.use_bias, "h_bias": self.module.use_bias}
        return ops.linear_moments(x, h, x[:, :0], **biases)[1], len(stored)

    def joint(self) -> dict[tuple[int, str], tuple[Tensor, int]]:
        """Five statistics, and S of the producer where there is one."""
        module, previous = self.module, self.module.previous_module
        stored, gradient = self.input_of(module), self.gradient(None)
        h, v = _rows(stored), _rows(gradient)
        x = h[:, :0] if previous is None else _rows(self.input_of(self.previous))
        x, h, v = _alike(x, h, v)
        need(len(x) == len(h) == len(v))
        x_bias = previous is not None and previous.use_bias
        xx, xh, xv, hh, hv, vv = ops.linear_moments(x, h, v, x_bias=x_bias, h_bias=module.use_bias)
        n = len(stored)
        found = {"s": (hh, n), "m": (hv, n), "e": (vv, len(gradient)), "m_prev": (xv, len(gradient)), "p": (xh, n)}
        named = {(id(module), name): update for name, update in found.items()}
        if previous is not None:
            named[id(previous), "s"] = xx, len(previous.input)
        return named


class Conv2dBatch(Batch):
    """Maps of a Conv2dGrowingModule.

    Parameters
    ----------
    module, kind
        As in `Batch`.
    kernel : str
        "center" for a RestrictedConv2dGrowingModule, "full" for a FullConv2dGrowingModule.
    """

    def __init__(self, module: Any, kind: type, kernel: str) -> None:
        super().__init__(module, kind)
        self.kernel = kernel

    def s(self) -> tuple[Tensor, int]:
        """Σ h hᵀ over images and output positions."""
        (h,) = _alike(self._maps(self.input_of(self.module)))
        consumer = _geometry(self.module)
        v = h.new_empty(len(h), 0, *_output_size(consumer, h))
        options: dict[str, Any] = {"kernel": "center", "h_bias": self.module.use_bias}
        return ops.conv2d_moments(h[:, :0], h, v, producer=_ONE, consumer=consumer, **options)[3], len(h)

    def m(self, desired_activation: Tensor | None = None) -> tuple[Tensor, int]:
        """Σ h vᵀ."""
        h, v = _alike(self._maps(self.input_of(self.module)), self._maps(self.gradient(desired_activation)))
        geometry = _geometry(self.module)
        need(len(h) == len(v) and v.shape[2:] == _output_size(geometry, h))
        return patch_products(h, v, geometry, _ONE, "center", v.shape[2:], self.module.use_bias), len(h)

    def e(self) -> tuple[Tensor, int]:
        """Σ v vᵀ over images and positions."""
        (v,) = _alike(self._maps(self.gradient(None)))
        none = v[:, :0]
        return ops.conv2d_moments(none, v, none, producer=_ONE, consumer=_ONE, kernel="center")[3], len(v)

    def m_prev(self, desired_activation: Tensor | None = None) -> tuple[Tensor, int]:
        """Σ x vᵀ at the kernel's centre, or at each of its taps."""
        x, v = _alike(self._producer_input(), self._maps(self.gradient(desired_activation)))
        producer, consumer = _geometry(self.previous), _geometry(self.module)
        hidden = self._hidden(x)
        need(len(x) == len(v) and v.shape[2:] == _output_size(consumer, hidden))
        return patch_products(x, v, producer, consumer, self.kernel, hidden, self.previous.use_bias), len(v)

    def p(self) -> tuple[Tensor, int]:
        """Σ x hᵀ at the kernel's centre, or at each of its taps."""
        x, h = _alike(self._producer_input(), self._maps(self.input_of(self.module)))
        producer, consumer = _geometry(self.previous), _geometry(self.module)
        need(len(x) == len(h) and h.shape[2:] == self._hidden(x))
        x_bias, h_bias = self.previous.use_bias, self.module.use_bias
        if self.kernel == "full":
            return cross_covariance(x, h, producer, consumer, x_bias, h_bias), len(h)
        v = h.new_empty(len(h), 0, *_output_size(consumer, h))
        options: dict[str, Any] = {"kernel": "center", "x_bias": x_bias, "h_bias": h_bias}
        return ops.conv2d_moments(x, h, v, producer=producer, consumer=consumer, **options)[1], len(h)

    def s_growth(self) -> tuple[Tensor, int]:
        """Σ x xᵀ over the hidden positions, each as often as the kernel reads it."""
        (x,) = _alike(self._producer_input())
        producer, consumer, hidden = _geometry(self.previous), _geometry(self.module), self._hidden(x)
        h, v = (x.new_empty(len(x), 0, *size) for size in (hidden, _output_size(consumer, hidden)))
        bias = self.previous.use_bias
        return ops.conv2d_moments(x, h, v, producer=producer, consumer=consumer, x_bias=bias)[0], len(x)

    def joint(self) -> dict[tuple[int, str], tuple[Tensor, int]]:
        """All but the cross covariance of "full"; without a stored input, what x and v give."""
        module, previous = self.module, self.module.previous_module
        v = self._maps(self.gradient(None))
        own = module.store_input
        if previous is None:
            h = self._maps(self.input_of(module))
            x, producer, x_bias = h[:, :0], _ONE, False
        else:
            x, producer, x_bias = self._producer_input(), _geometry(self.previous), previous.use_bias
            h = self._maps(self.input_of(module)) if own else x.new_empty(len(x), 0, *self._hidden(x))
            need(h.shape[2:] == self._hidden(x))
        x, h, v = _alike(x, h, v)
        consumer, n = _geometry(module), len(v)
        need(len(x) == len(h) == n and v.shape[2:] == _output_size(consumer, h))
        options: dict[str, Any] = {"kernel": self.kernel, "x_bias": x_bias, "h_bias": own and module.use_bias}
        xx, xh, xv, hh, hv, vv = ops.conv2d_moments(x, h, v, producer=producer, consumer=consumer, **options)
        found = {"e": vv, "m_prev": xv}
        if own:
            found |= {"s": hh, "m": hv}
        if own and self.kernel == "center":
            found["p"] = xh
        if self.kernel == "full":
            found["s_growth"] = xx
        named = {(id(module), name): (update, n) for name, update in found.items()}
        if previous is not None and self.kernel == "center" and _reads_all_once(consumer, h, v):
            named[id(previous), "s"] = xx, n
        return named

    def _maps(self, maps: Tensor) -> Tensor:
        need(maps.ndim == 4)
        return maps

    def _producer_input(self) -> Tensor:
        return self._maps(self.input_of(self.previous))

    def _hidden(self, x: Tensor) -> torch.Size:
        """Size of the map between the two modules, where the module takes the producer's output as it is."""
        hidden = _output_size(_geometry(self.previous), x)
        full = self.kernel == "full"
        try:
            size = self.module.input_size if full else self.module.update_input_size(compute_from_previous=True)
        except ValueError:
            raise NotCovered from None
        need(size is not None and tuple(size) == tuple(hidden))
        return hidden


def _rows(values: Tensor) -> Tensor:
    need(values.ndim > 1)
    return values.flatten(0, -2)


def _row_products(left: Tensor, right: Tensor, bias: bool) -> Tensor:
    """Σ left rightᵀ over the rows, left with a last one if `bias`."""
    left, right = _alike(_rows(left), _rows(right))
    need(len(left) == len(right))
    none = torch.zeros(right.shape[1], 0, device=right.device)
    return ops.linear_residual(left, left[:, :0], right, none, x_bias=bias)[0]


def _geometry(module: Any) -> ConvGeometry:
    try:
        return ConvGeometry(module.kernel_size, module.stride, module.padding, module.dilation)
    except (TypeError, ValueError):  # padding="same"
        raise NotCovered from None


def _output_size(geometry: ConvGeometry, maps: Tensor | torch.Size) -> torch.Size:
    height, width = maps[-2:] if isinstance(maps, torch.Size) else maps.shape[-2:]
    size = geometry.output_size(height, width)
    need(min(size) > 0)
    return torch.Size(size)


def _reads_all_once(consumer: ConvGeometry, h: Tensor, v: Tensor) -> bool:
    """Whether the centre tap reads each hidden position once, so that xx is S of the producer."""
    centres = tuple(dilation * (k // 2) for k, dilation in zip(consumer.kernel_size, consumer.dilation, strict=True))
    return h.shape[2:] == v.shape[2:] and consumer.stride == (1, 1) and consumer.padding == centres


class Shared:
    """The statistics of one call of `update_computation`, several from one op.

    Parameters
    ----------
    batch : Batch
        Of the module that is updated.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._found: dict[tuple[int, str], tuple[Tensor, int]] | None = None

    def take(self, module: Any, name: str) -> tuple[Tensor, int] | None:
        """Hand a statistic over, once.

        Parameters
        ----------
        module : GrowingModule
            Whose statistic.
        name : str
            Which one.

        Returns
        -------
        tuple of Tensor and int, or None
            The sum and the number of samples; None where it is not among them.
        """
        if self._found is None:
            try:
                self._found = self._batch.joint()
            except NotCovered:
                self._found = {}
        return self._found.pop((id(module), name), None)
