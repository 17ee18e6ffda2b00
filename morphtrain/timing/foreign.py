"""How much of this run's cores other processes use, by the kernel's own account (Linux; proc(5))."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
IDLE_COLUMNS = (3, 4)  # idle, iowait
COUNTED_TWICE = 8  # from here on: guests, whose time is also in user and nice
WINDOW = 1.0  # seconds; a tick of 10 ms is 1 % of it


@dataclass(frozen=True)
class Reading:
    """Seconds: the time, how long the CPUs have been busy, and how much of it was this process's work."""

    at: float
    busy: float
    own: float


class ForeignCpu:
    """The share of `cpus` that others used; a hypervisor that takes them for other machines is one of them."""

    def __init__(self, cpus: frozenset[int]) -> None:
        self.cpus = cpus
        self.readings: deque[Reading] = deque()

    def begin(self) -> None:
        """To be called when a period begins."""
        self.readings.append(self._read())

    def share(self) -> float:
        """0..1, of the time since `begin`, or, if that is shorter, of a second or so before now."""
        self.begin()
        now = self.readings[-1]
        while now.at - self.readings[1].at >= WINDOW:
            self.readings.popleft()
        return foreign_share(self.readings[0], now, len(self.cpus))

    def _read(self) -> Reading:
        return Reading(time.perf_counter(), busy_seconds(self.cpus), own_seconds())


def foreign_share(start: Reading, end: Reading, cpus: int) -> float:
    """The share of `cpus` CPUs' time that was neither idle nor own; 0 where ticks make it less."""
    foreign = (end.busy - start.busy) - (end.own - start.own)
    return min(1.0, max(0.0, foreign / (cpus * (end.at - start.at))))


def measurable() -> bool:
    """Whether this system keeps such an account."""
    return (PROC / "stat").exists()


def busy_seconds(cpus: frozenset[int]) -> float:
    """How long these CPUs have not been idle since the machine started, added up."""
    ticks = 0
    for line in (PROC / "stat").read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cpus:
            ticks += sum(int(v) for i, v in enumerate(values[:COUNTED_TWICE]) if i not in IDLE_COLUMNS)
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU time of this process, of its living workers (of a data loader, say), and of all ended children."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid is not None)]
    return sum(map(_process_seconds, processes))


def _process_seconds(pid: int) -> float:
    """Of all its threads, and of the children it has waited for; 0 if it ended: then it is one of those."""
    try:
        line = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    columns = line.rpartition(")")[2].split()  # behind the name, which may hold anything: from column 3 on
    return sum(map(int, columns[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime
