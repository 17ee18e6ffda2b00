"""A callback of one's own: the run ends when it has not become better for a while."""

from __future__ import annotations

from morphtrain.method import Method
from morphtrain.state import Run


class Patience(Method):
    """End the run once `epochs` epochs in a row have not beaten the best `val_accuracy` before them."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def after_epoch(self, run: Run) -> None:
        seen = [record["val_accuracy"] for record in run.history]  # of the epochs before this one, also after a resume
        if len(seen) > self.epochs and max(seen[-self.epochs :]) <= max(seen[: -self.epochs]):
            run.stopped = True
