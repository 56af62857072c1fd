"""Look at a model without leaving a trace: modes, buffers and random numbers are restored after."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; restore each module's mode, all buffers and random numbers after."""
    modes = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    with same_draws(model), torch.inference_mode(False):  # its tensors could be neither measured nor trained
        model.eval()
        try:
            yield
        finally:
            for module, training, buffers in modes:
                module.training = training
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, version, content in contents:
                    if buffer._version != version:
                        buffer.copy_(content)


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Restore the random number generators after: what runs twice inside draws the same numbers."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


@contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """Compute batch norms of known statistics as one product and sum, without gradients of their weights.

    What they read need not be held for the backward pass then: nearly half of what a graph of convolutions, norms
    and activations holds.
    """
    norms = [module for module in model.modules() if type(module) in _NORMS and "forward" not in vars(module)]
    try:
        for norm in norms:
            norm.forward = functools.partial(_fixed_norm, norm)
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _fixed_norm(norm: Any, input: Tensor) -> Tensor:
    mean, variance = norm.running_mean, norm.running_var
    known = [each for each in (mean, variance, norm.weight, norm.bias) if each is not None]
    if norm.training or not input.requires_grad or mean is None or variance is None:
        return type(norm).forward(norm, input)
    if any(each.dtype != input.dtype for each in known):
        return type(norm).forward(norm, input)
    norm._check_input_dim(input)
    scale = (variance + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach())
    shift = (0 if norm.bias is None else norm.bias.detach()) - mean * scale
    shift, scale = (each.view(-1, *[1] * (input.dim() - 2)) for each in (shift, scale))
    return torch.addcmul(shift, input, scale)
