"""Wall-clock time that includes the device's work, by waiting for the device where a timed block starts and ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from morphtrain import world
from morphtrain.cost.stopwatch import wait_for


class Clock:
    """Times blocks of work on `device`; `seconds` holds the latest time of each block, by name.

    `cpu_seconds` holds what the threads of this process have computed meanwhile: others on its cores do not count.
    Several processes begin a block together, and each has its own time of it until they `agree`.

    Args:
        device: to wait for.
        sync: "edges" waits for the device when a block starts and ends, "each" also after every training step (the
            thesis's synchronous mode), "none" never: then work that the device has not finished is not counted.
    """

    def __init__(self, device: torch.device, sync: str = "edges") -> None:
        self.device = device
        self.sync = sync
        self.seconds: dict[str, float] = {"setup_seconds": 0.0}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Store the time of the block in `seconds[name]`."""
        if self.sync != "none":
            self.wait()
        world.wait()
        start, computed = time.perf_counter(), time.process_time()
        yield
        if self.sync != "none":
            self.wait()
        self.seconds[name], self.cpu_seconds[name] = time.perf_counter() - start, time.process_time() - computed

    def agree(self) -> None:
        """Let all times be those of the slowest process, in all processes: nobody is done before it is."""
        self.seconds = world.largest_of(self.seconds)

    def step_done(self) -> None:
        """Wait for the device if `sync` is "each"; call this after every training step."""
        if self.sync == "each":
            self.wait()

    def wait(self) -> None:
        """Wait until the device has finished its work; a CPU always has."""
        wait_for(self.device)
