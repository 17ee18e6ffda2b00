"""How often to retry what keeps failing."""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.005  # of the time, for the failed attempts of a tracker


class Pace:
    """Delays the next attempt so that failed ones take at most `share` of the time.

    Args:
        share: of the time, above 0.
        clock: returns the time in seconds.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.share = share
        self.clock = clock
        self.failing = False
        self.next_try = float("-inf")

    @property
    def due(self) -> bool:
        """Whether it is time for the next attempt."""
        return self.clock() >= self.next_try

    def failed(self, seconds: float) -> None:
        """Note that the attempt that has just ended failed, after `seconds`."""
        self.failing = True
        self.next_try = self.clock() + seconds / self.share

    def succeeded(self) -> None:
        """Note that the attempt succeeded: the next one is due at once."""
        self.failing = False
        self.next_try = float("-inf")
