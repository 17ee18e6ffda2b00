"""The CPU cores that this process may use, and pinning it to some of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
THREADS = Path("/proc/self/task")


def allowed_cores() -> dict[str, frozenset[int]]:
    """The cores that this process may use: core name to the CPUs (hardware threads) of that core that it may use.

    The CPUs of a core share its arithmetic units and caches, so only a whole core is undisturbed. On systems other than
    Linux, which do not say which CPUs share a core, each CPU counts as a core.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores: dict[str, frozenset[int]] = {}
    for cpu in sorted(cpus):
        name = f"core {min(_siblings(cpu))}"
        cores[name] = cores.get(name, frozenset()) | {cpu}
    return cores


def _siblings(cpu: int) -> set[int]:
    """The CPUs of the core that `cpu` belongs to; Linux writes such a list as "0,4" or "0-1"."""
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
    """Pin all threads of this process, and those it starts meanwhile, to `cpus`; restore each one's CPUs afterwards.

    Affinity belongs to a thread: setting only the calling thread's would miss torch's running workers. Threads started
    during the block inherit it, and afterwards get the calling thread's former affinity. On systems without affinities
    (macOS) this does nothing.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    affinities: dict[int, Set[int]] = {}
    for thread in _threads():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            affinities[thread] = os.sched_getaffinity(thread)
    _move(dict.fromkeys(affinities, cpus))
    try:
        yield
    finally:
        _move({thread: affinities.get(thread, before) for thread in _threads()})


def _threads() -> list[int]:
    """Thread ids of this process, the main thread first: threads it starts while others are moved inherit its CPUs."""
    return sorted(int(entry.name) for entry in THREADS.iterdir())


def _move(affinities: Mapping[int, Set[int]]) -> None:
    for thread, cpus in affinities.items():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(thread, cpus)
