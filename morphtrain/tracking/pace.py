"""How often to try what keeps failing."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Puts off the next try so long that failed ones take at most `share` of the time.

    Args:
        share: of the time, above 0.
        clock: seconds.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.share = share
        self.clock = clock
        self.failing = False
        self.next_try = float("-inf")

    @property
    def due(self) -> bool:
        return self.clock() >= self.next_try

    def failed(self, seconds: float) -> None:
        """The try that has just ended took so long, for nothing."""
        self.failing = True
        self.next_try = self.clock() + seconds / self.share

    def succeeded(self) -> None:
        self.failing = False
        self.next_try = float("-inf")
