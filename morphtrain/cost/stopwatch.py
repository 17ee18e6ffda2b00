"""Seconds of a piece of work on a device, for the measurements that decide something.

Those are the time of layers, the throughput by batch size, the speed of a reduced precision and the fastest widths.
Each decides for itself how often it looks and what it makes of the times. `torch.utils.benchmark.Timer` does not serve
here: it works with a single thread unless told otherwise, waits for the current device instead of a given one, and
repeats one piece of work, while widths are compared in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def wait_for(device: torch.device) -> None:
    """Wait until `device` has done all it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of `work`: from an idle `device` until it is idle again."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start
