"""The processes that train one network together: how many there are, which one this is, and what they agree on.

Usually there is one; several must have called `torch.distributed.init_process_group` first. Measurements and random
numbers differ between processes, but their networks must not: a decision based on either goes through `agree`.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _is_distributed() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and reports."""
    return rank() == 0


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes; the same shape. Every process has to call it."""
    if size() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / size()


def agree(value: T) -> T:
    """The main process's value, in every process. Every process has to call it; with one process it costs nothing."""
    if size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
