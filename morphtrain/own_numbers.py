"""Random numbers that each of several processes draws for its own images; all others are the same in all of them.

Dropout, and what methods do to images before they go through the network, draw as many numbers as there are images,
which differ between processes. Everything else that draws from torch's numbers decides about the network: how weights
are rounded, what grows. It draws from a stream that nothing of the above has touched, so that all processes decide
alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnNumbers:
    """A stream of torch's random numbers beside the common one."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._states: list[torch.Tensor] = []  # of the CPU's numbers, and of a GPU's

    @contextmanager
    def drawn(self, seed: int, device: torch.device) -> Iterator[None]:
        """Draw from this stream within the block; a seed other than the last block's starts it afresh."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if seed == self._seed:
                self._restore(device)
            else:
                torch.manual_seed(seed)
            yield
            self._seed, self._states = seed, [torch.get_rng_state()]
            if device.type == "cuda":
                self._states.append(torch.cuda.get_rng_state(device))

    def _restore(self, device: torch.device) -> None:
        torch.set_rng_state(self._states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self._states[1], device)
