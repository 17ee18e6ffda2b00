"""How much of this run's cores other processes use, from the kernel's accounting (Linux; proc(5))."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
IDLE_COLUMNS = (3, 4)  # idle, iowait
COUNTED_TWICE = 8  # columns from here on: guest time, which is already part of user and nice
PID, PARENT = 0, 2  # columns of a process
WINDOW = 1.0  # seconds; one kernel tick (10 ms) is 1 % of it


@dataclass(frozen=True)
class Reading:
    """In seconds: the time of the reading, the CPUs' busy time, and the part of it that was this process's work."""

    at: float
    busy: float
    own: float


class ForeignCpu:
    """The share of `cpus` that others used, which includes time that a hypervisor gave to other virtual machines.

    Args:
        beside: ids of processes that, with their children, are no others either.
    """

    def __init__(self, cpus: frozenset[int], beside: frozenset[int] = frozenset()) -> None:
        self.cpus, self.beside = cpus, beside
        self.readings: deque[Reading] = deque()

    def begin(self) -> None:
        """Begin a period."""
        self.readings.append(self._read())

    def share(self) -> float:
        """The others' share, 0..1, since `begin` or, if that is shorter, in about the last second."""
        self.begin()
        now = self.readings[-1]
        while now.at - self.readings[1].at >= WINDOW:
            self.readings.popleft()
        return foreign_share(self.readings[0], now, len(self.cpus))

    def _read(self) -> Reading:
        return Reading(time.perf_counter(), busy_seconds(self.cpus), own_seconds() + family_seconds(self.beside))


def foreign_share(start: Reading, end: Reading, cpus: int) -> float:
    """The share of the time of `cpus` CPUs that was neither idle nor own; at least 0, despite coarse kernel ticks."""
    foreign = (end.busy - start.busy) - (end.own - start.own)
    return min(1.0, max(0.0, foreign / (cpus * (end.at - start.at))))


def measurable() -> bool:
    """Whether this system has such accounting."""
    return (PROC / "stat").exists()


def busy_seconds(cpus: frozenset[int]) -> float:
    """Seconds that these CPUs have been busy since the machine started, summed over them."""
    ticks = 0
    for line in (PROC / "stat").read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cpus:
            ticks += sum(int(v) for i, v in enumerate(values[:COUNTED_TWICE]) if i not in IDLE_COLUMNS)
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process, its living workers (such as a data loader's), and all children that have ended."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid is not None)]
    return sum(map(_process_seconds, processes))


def family_seconds(parents: frozenset[int]) -> float:
    """CPU seconds of these processes, and of all children of theirs."""
    if not parents:
        return 0.0
    found = (_columns(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdecimal())
    family = [columns for columns in found if columns and parents & {int(columns[PID]), int(columns[PARENT])}]
    return sum(map(_seconds, family))


def _process_seconds(pid: int) -> float:
    """CPU seconds of a process's threads and of children it waited for; 0 if it has ended, as its parent counts it."""
    columns = _columns(pid)
    return _seconds(columns) if columns else 0.0


def _columns(pid: int) -> list[str]:
    """What the kernel says of a process, the name left out, which may contain anything; nothing if it has ended."""
    try:
        line = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [line.partition(" ")[0], *line.rpartition(")")[2].split()]


def _seconds(columns: Sequence[str]) -> float:
    return sum(map(int, columns[12:16])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime
