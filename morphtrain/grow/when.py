"""When to grow: after given epochs, and when validation accuracy stops rising."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from morphtrain import schema
from morphtrain.state import Run
from morphtrain.wording import counted

log = logging.getLogger(__name__)


class When:
    """Decides after which epochs a network grows; it reads the records, so its only state is when it has grown.

    A plateau: the exponentially smoothed validation accuracy has not risen above its best for `patience` epochs. It is
    counted from scratch after each growth. The epoch just trained is evaluated only after the change, so a plateau is
    judged by the epochs before it.
    """

    def __init__(self, config: schema.grow.Planned) -> None:
        self.config = config
        self.grown_at: list[int] = []  # epochs after which the network grew

    def check_reach(self, run: Run) -> None:
        """Warn if the run is too short for a plateau of `patience` epochs before its last one."""
        patience, epochs = self.config.patience, run.config.epochs
        if not self.config.at_epochs and patience is not None and patience > epochs - 3:
            log.warning(
                "grow.patience=%d: with epochs=%d the network cannot grow; %d epochs or more would let it",
                patience,
                epochs,
                patience + 3,
            )

    def due(self, run: Run) -> str:
        """The reason to grow after this epoch; "" if there is none."""
        if run.epoch in self.config.at_epochs:
            return f"epoch {run.epoch}"
        patience = self.config.patience
        if patience is None or len(self.grown_at) >= self.config.max_times or run.epoch >= run.config.epochs:
            return ""
        flat = epochs_without_gain(run.history[self.grown_at[-1] if self.grown_at else 0 :], self.config.smoothing)
        return f"val_accuracy flat for {counted(flat, 'epoch')}" if flat >= patience else ""


def epochs_without_gain(history: Sequence[Mapping[str, float]], smoothing: float, key: str = "val_accuracy") -> int:
    """Epochs since the smoothed metric reached its maximum; 0 for an empty history."""
    values = smoothed([record[key] for record in history], smoothing)
    best = max(range(len(values)), key=values.__getitem__, default=-1)  # the first of equals
    return len(values) - 1 - best if values else 0


def smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    """Exponential moving average that starts at the first value; `smoothing` in [0, 1) is the share of the past."""
    result: list[float] = []
    for value in values:
        result.append(smoothing * result[-1] + (1 - smoothing) * value if result else value)
    return result
