"""Wall-clock time that means what it says: device work is waited for at the edges of what is timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from morphtrain.cost.stopwatch import wait_for


class Clock:
    """Times blocks of work on `device`; `seconds` holds the last time of each, by its name.

    Args:
        sync: "edges" waits for the device when a block starts and ends, "each" also after every training step (the
            thesis's synchronous mode), "none" never: then launched work that still runs is charged to nobody.
    """

    def __init__(self, device: torch.device, sync: str = "edges") -> None:
        self.device = device
        self.sync = sync
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Clock the block as `seconds[name]`."""
        if self.sync != "none":
            self.wait()
        start = time.perf_counter()
        yield
        if self.sync != "none":
            self.wait()
        self.seconds[name] = time.perf_counter() - start

    def step_done(self) -> None:
        """To be called after every training step."""
        if self.sync == "each":
            self.wait()

    def wait(self) -> None:
        """Until the device has done all it was given; on a CPU that is always so."""
        wait_for(self.device)
