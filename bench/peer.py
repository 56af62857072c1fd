"""gromo 0.1.0's own classes on the same maps: the statistics of one batch, in the order of the ops."""

from typing import Any

import torch
from cases import Case, Conv2dCase, LinearCase
from torch import Tensor

NAMES = ("tensor_s_growth", "cross_covariance", "tensor_m_prev", "tensor_s", "tensor_m", "covariance_loss_gradient")
LIMIT = {"cpu": 2e12, "cuda": 1e14}  # operations beyond which gromo is left out without `--patience`


def statistics(case: Case, args: tuple[Tensor, ...]) -> Any:
    """A call that has gromo sum xx, xh, xv, hh, hv and vv of the batch; xh not for a whole kernel, as in the op.

    Raises
    ------
    ImportError
        If gromo is not installed.
    """
    import gromo.modules.conv2d_growing_module as maps
    from gromo.modules.linear_growing_module import LinearGrowingModule

    x, h, v = args
    options: dict[str, Any] = {"device": x.device}
    if isinstance(case, Conv2dCase):
        kind = maps.FullConv2dGrowingModule if case.kernel == "full" else maps.RestrictedConv2dGrowingModule
        first = _convolution(kind, case, 0, options)
        second = _convolution(kind, case, 1, {**options, "previous_module": first, "allow_growing": True})
    else:
        assert isinstance(case, LinearCase)
        p, q, r = case.widths
        first = LinearGrowingModule(p, q, use_bias=case.x_bias, **options)
        second = LinearGrowingModule(q, r, use_bias=case.h_bias, previous_module=first, allow_growing=True, **options)
    second.init_computation()
    second(first(x))  # sets sizes; then the maps of the case take the place of what was stored
    first._input, second._input = x, h
    second._pre_activity = torch.empty_like(v)
    second._pre_activity.grad = v
    names = [name for name in NAMES if name != "cross_covariance" or getattr(case, "kernel", "") != "full"]

    def run() -> list[Tensor]:
        statistic = [getattr(second, name) for name in names]
        for each in statistic:
            each.reset()
            each.updated = False
            each.update()
        found = [each._tensor for each in statistic]
        return found if len(found) == 6 else [found[0], found[0].new_empty(len(found[0]), 0), *found[1:]]

    return run


def operations(case: Case) -> float:
    """What gromo multiplies, about: a mask of (positions, taps, positions) four times for a whole kernel."""
    if not isinstance(case, Conv2dCase) or case.kernel != "full":
        return 0.0
    p, n, m = case.channels[0] * case.producer.taps + 1, *(h * w for h, w in (case.hidden, case.outputs))
    masked = case.batch * case.consumer.taps * m * p
    return 2.0 * masked * (4 * n + p + case.channels[2])


def _convolution(kind: type, case: Conv2dCase, side: int, options: dict[str, Any]) -> Any:
    geometry = (case.producer, case.consumer)[side]
    channels = case.channels[side : side + 2]
    return kind(
        *channels,
        geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        use_bias=(case.x_bias, case.h_bias)[side],
        input_size=(case.maps, case.hidden)[side],
        **options,
    )
