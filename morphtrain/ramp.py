"""A factor on the learning rate that moves from one value to another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Ramp:
    """A linear move from `start` to `end` over `epochs` epochs, beginning after `since`; then `end`."""

    start: float = 1.0
    end: float = 1.0
    since: float = 0.0
    epochs: float = 0.0

    def at(self, epochs_done: float) -> float:
        """The factor after `epochs_done` epochs, fractions included."""
        passed = epochs_done - self.since
        return self.end if passed >= self.epochs else self.start + (self.end - self.start) * passed / self.epochs

    def turned(self, epochs_done: float, end: float, epochs: float) -> Ramp:
        """A ramp to `end` over `epochs`, starting from this one's value at `epochs_done`."""
        return Ramp(self.at(epochs_done), end, epochs_done, epochs)
