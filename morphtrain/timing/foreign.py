"""How much of this run's cores other processes use, from the kernel's accounting (Linux; proc(5))."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
IDLE_COLUMNS = (3, 4)  # idle, iowait
COUNTED_TWICE = 8  # columns from here on: guest time, which is already part of user and nice
WINDOW = 1.0  # seconds; one kernel tick (10 ms) is 1 % of it


@dataclass(frozen=True)
class Reading:
    """In seconds: the time of the reading, the CPUs' busy time, and the part of it that was this process's work."""

    at: float
    busy: float
    own: float


class ForeignCpu:
    """The share of `cpus` that others used, which includes time that a hypervisor gave to other virtual machines."""

    def __init__(self, cpus: frozenset[int]) -> None:
        self.cpus = cpus
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
        return Reading(time.perf_counter(), busy_seconds(self.cpus), own_seconds())


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


def _process_seconds(pid: int) -> float:
    """CPU seconds of a process's threads and of children it waited for; 0 if it has ended, as its parent counts it."""
    try:
        line = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    columns = line.rpartition(")")[2].split()  # column 3 and up: the name may contain anything
    return sum(map(int, columns[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime
