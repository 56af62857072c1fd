"""What training and growing cost, in multiply-adds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import growkern.ops  # noqa: F401  (defines the ops that are counted)
from growkern.training.batches import batch_size

Result = TypeVar("Result")


def multiply_adds(work: Callable[[], Result]) -> tuple[float, Result]:
    """Count the multiply-adds of some work.

    Parameters
    ----------
    work : callable
        Called once, without arguments.

    Returns
    -------
    tuple
        PyTorch's own count of matrix products and convolutions, with one multiply-add for each sample, position
        and entry of a second moment, 9·n³ for each eigenproblem, n³/6 for each factor by Cholesky's method, n²·m/2 for
        each triangular solve of m columns and 2·n·m² for each basis of m columns; and what `work` returned.
    """

    def second_moments(_: Any, h: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
        return 2 * h[0] * math.prod(h[2:]) * sum(map(math.prod, out_shape))

    ops = torch.ops.growkern
    counted: dict[Any, Any] = {
        op: second_moments for op in (ops.linear_moments, ops.conv2d_moments, ops.linear_residual, ops.conv2d_residual)
    }
    counted[ops.eigh] = lambda a, **options: 18 * math.prod(a) * a[-1]
    aten = torch.ops.aten
    counted[aten.linalg_cholesky_ex] = lambda a, *rest, **options: math.prod(a) * a[-1] // 3
    counted[aten.linalg_solve_triangular] = lambda a, b, **options: math.prod(b) * a[-1]
    counted[aten.linalg_qr] = lambda a, *rest, **options: 4 * math.prod(a) * a[-1]
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        result = work()
    return counter.get_total_flops() / 2, result


def cost_per_sample(
    model: nn.Module, batch: tuple[tuple[Any, ...], Any], loss_fn: Callable[[Any, Any], Tensor]
) -> float:
    """Multiply-adds of one forward and backward pass, for each sample of a batch; the model is not changed."""
    twin, (args, target) = copy.deepcopy(model), batch
    with torch.random.fork_rng():
        cost, _ = multiply_adds(lambda: loss_fn(twin(*args), target).backward())
    return cost / batch_size(args)
