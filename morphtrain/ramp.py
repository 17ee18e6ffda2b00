"""A factor on the learning rate that moves from one value to another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Ramp:
    """From `start` to `end`, linearly over the `epochs` that follow the first `since`; `end` from then on."""

    start: float = 1.0
    end: float = 1.0
    since: float = 0.0
    epochs: float = 0.0

    def at(self, epochs_done: float) -> float:
        """The factor after so many epochs, fractions included."""
        passed = epochs_done - self.since
        return self.end if passed >= self.epochs else self.start + (self.end - self.start) * passed / self.epochs

    def turned(self, epochs_done: float, end: float, epochs: float) -> Ramp:
        """The ramp that goes on to `end` from where this one is."""
        return Ramp(self.at(epochs_done), end, epochs_done, epochs)
