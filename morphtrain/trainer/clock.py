"""Wall-clock time that means what it says: device work is waited for at the edges of what is timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Stopwatch:
    """The result of `Clock.timed`: seconds, once the block has ended."""

    seconds: float = 0.0


class Clock:
    """Times blocks of work on `device`.

    Args:
        sync: "edges" waits for the device when a block starts and ends, "each" also after every training step (the
            thesis's synchronous mode), "none" never: then launched work that still runs is charged to nobody.
    """

    def __init__(self, device: torch.device, sync: str = "edges") -> None:
        self.device = device
        self.sync = sync

    @contextmanager
    def timed(self) -> Iterator[Stopwatch]:
        watch = Stopwatch()
        if self.sync != "none":
            self.wait()
        start = time.perf_counter()
        yield watch
        if self.sync != "none":
            self.wait()
        watch.seconds = time.perf_counter() - start

    def step_done(self) -> None:
        """To be called after every training step."""
        if self.sync == "each":
            self.wait()

    def wait(self) -> None:
        """Until the device has done all it was given; on a CPU that is always so."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
