"""Sums across the processes of a `torch.distributed` group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank(group: dist.ProcessGroup | None) -> int:
    """Rank of this process in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def all_sum(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace each tensor, in place, by its sum over the group; without a group leave it."""
    if group is not None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)


def total(number: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """Sum of one integer over the group."""
    if group is None:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, group=group)
    return int(value)


def agree(decision: Any, group: dist.ProcessGroup | None) -> Any:
    """Return what the group's first process decided."""
    if group is None:
        return decision
    box = [decision]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]
