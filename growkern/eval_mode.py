"""Look at a model without leaving a trace: modes, buffers and random numbers are restored after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; restore each module's mode, all buffers and random numbers after."""
    modes = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    with same_draws(model):
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
