"""The processor cores this process may use, and how it keeps to some of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
THREADS = Path("/proc/self/task")


def allowed_cores() -> dict[str, frozenset[int]]:
    """The cores this process may use, by name: which of their CPUs (hardware threads) it may use.

    Two CPUs of one core share its arithmetic units and caches, so that it takes a whole core to be undisturbed. Where
    the system does not say which belong together (other than Linux), each is a core.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores: dict[str, frozenset[int]] = {}
    for cpu in sorted(cpus):
        name = f"core {min(_siblings(cpu))}"
        cores[name] = cores.get(name, frozenset()) | {cpu}
    return cores


def _siblings(cpu: int) -> set[int]:
    """The CPUs of the core that `cpu` belongs to; "0,4" and "0-1" are how Linux writes them."""
    path = CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    if not path.exists():
        return {cpu}
    siblings: set[int] = set()
    for part in path.read_text().strip().split(","):
        first, _, last = part.partition("-")
        siblings |= set(range(int(first), int(last or first) + 1))
    return siblings


@contextmanager
def pinned(cpus: frozenset[int]) -> Iterator[None]:
    """Keep all threads of this process, and those it starts meanwhile, on `cpus`; afterwards each is where it was.

    An affinity belongs to a thread: torch's workers, started before, would stay where they are. A thread that starts
    inherits it, and later gets what the calling thread has. Where there are no affinities (macOS) nothing happens.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    affinities: dict[int, Set[int]] = {}
    for thread in _threads():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            affinities[thread] = os.sched_getaffinity(thread)
    _move(dict.fromkeys(affinities, cpus))
    try:
        yield
    finally:
        _move({thread: affinities.get(thread, before) for thread in _threads()})


def _threads() -> list[int]:
    """Of this process; the first of them first, so that what it starts meanwhile is already in the right place."""
    return sorted(int(entry.name) for entry in THREADS.iterdir())


def _move(affinities: Mapping[int, Set[int]]) -> None:
    for thread, cpus in affinities.items():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, cpus)
