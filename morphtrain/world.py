"""The processes that train one network together: how many there are, which one this is, and what they agree on.

Usually there is one, and everything here costs nothing. Several must have called `torch.distributed.init_process_group`
first. Measurements and random numbers differ between processes, but their networks must not: a decision based on
either goes through `agree` or `decide`. Every process has to call these functions, in the same order.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass
class Traffic:
    """What this process has sent, one way, and waited for since it was last set to zero: tensors summed or stacked."""

    bytes: int = 0
    seconds: float = 0.0


traffic = Traffic()

_by_itself = 0  # how many blocks of `alone` this process is in


@contextmanager
def alone() -> Iterator[None]:
    """Within it, this process goes by itself: it waits for no other, and nothing that it computes is of others."""
    global _by_itself
    _by_itself += 1
    try:
        yield
    finally:
        _by_itself -= 1


@dataclass
class Progress:
    """How far this process has come, for those who watch whether one keeps the others waiting.

    Args:
        begun: calls of functions that every process has to call.
        inside: whether it is in one of them.
        explain: called with an error in one of them; raises its cause in another process, if it has one there.
    """

    begun: int = 0
    inside: bool = False
    explain: Callable[[RuntimeError], None] | None = None


progress = Progress()


@dataclass(frozen=True)
class Local:
    """Which of a run's processes on this host this one is, and how many there are here."""

    rank: int = 0
    size: int = 1


local = Local()  # set by what forms the group (`morphtrain.processes.join`)


def size() -> int:
    """Number of processes; 1 while this one is `alone`."""
    return 1 if _by_itself else members()


def members() -> int:
    """Number of processes, whether this one is `alone` or not."""
    return distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _is_distributed() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and reports."""
    return rank() == 0


def sum_(tensors: Sequence[torch.Tensor]) -> None:
    """Sum each of these tensors over all processes, in place: one message for all of a type and device.

    The sums have the same bits in every process. Shapes, types and order have to be the same in all.
    """
    if size() == 1:
        return
    with meeting(), _counted():
        ordered = sorted(tensors, key=_kind)  # stable, so that every process has the same order
        for _, group in groupby(ordered, key=_kind):
            alike = list(group)
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
            distributed.all_reduce(flat)
            traffic.bytes += flat.numel() * flat.element_size()
            for tensor, summed in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.detach().copy_(summed.view(tensor.shape))


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes; the same shape."""
    if size() == 1:
        return value
    total = value.detach().clone()
    sum_([total])
    return total / size()


def stacked(tensor: torch.Tensor) -> torch.Tensor:
    """What all processes have of a tensor of one shape, type and device, by rank: (size, *shape)."""
    if size() == 1:
        return tensor.detach()[None]
    with meeting(), _counted():
        found = [torch.empty_like(tensor) for _ in range(size())]
        distributed.all_gather(found, tensor.detach())
        traffic.bytes += tensor.numel() * tensor.element_size()
    return torch.stack(found)


def largest(value: float) -> float:
    """The largest of the values that the processes have."""
    return largest_of({"": value})[""]


def largest_of(values: Mapping[str, float]) -> dict[str, float]:
    """The largest of each of these values, of which all processes have the same ones."""
    if size() == 1:
        return dict(values)
    found = torch.tensor(list(values.values()), dtype=torch.float64)  # on the CPU, where every group can compute
    with meeting():
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return dict(zip(values, found.tolist(), strict=True))


def wait() -> None:
    """Wait until all processes have come here."""
    largest(0.0)


def agree(value: T) -> T:
    """The main process's value, in every process."""
    if size() == 1:
        return value
    values = [value]
    with meeting():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: T) -> list[T]:
    """The values that all processes have, by rank, in every process."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with meeting():
        distributed.all_gather_object(values, value)
    return values


def together(make: Callable[[], T]) -> T:
    """What `make` returns in this process; if it fails in any of them, the first failure is raised in all.

    Every process calls it, and within it waits for no other.
    """
    if size() == 1:
        return make()
    value: Any = None
    failure: Exception | None = None
    try:
        value = make()
    except Exception as error:  # noqa: BLE001 - it is raised below
        failure = error
    failures = gathered(None if failure is None else _sendable(failure))
    first = next((error for error in failures if error is not None), None)
    if first is not None:
        raise failure or first
    return value  # what `make` returns


def decide(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, which alone calls it, in every process; or the error that it raises.

    Meanwhile the main process is `alone`.
    """
    if size() == 1:
        return make()
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            with alone():
                outcome = (make(), None)
        except Exception as error:
            agree((None, _sendable(error)))
            raise
    value, failure = agree(outcome)
    if failure is not None:
        raise failure
    return value  # what the main process has sent


@contextmanager
def meeting() -> Iterator[None]:
    """Around what every process has to call: it counts how far this one has come, and errors get their cause."""
    progress.begun += 1
    progress.inside = True
    try:
        yield
    except RuntimeError as error:  # what torch raises when another process is gone
        if progress.explain is not None:
            progress.explain(error)
        raise
    finally:
        progress.inside = False


def _sendable(error: Exception) -> Exception:
    """The error, or if it cannot be pickled one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its class does when it is made again
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _kind(tensor: torch.Tensor) -> tuple[str, str]:
    return str(tensor.device), str(tensor.dtype)


@contextmanager
def _counted() -> Iterator[None]:
    start = time.perf_counter()
    yield
    traffic.seconds += time.perf_counter() - start


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
