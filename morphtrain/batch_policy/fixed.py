"""The same batch size throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphtrain import schema
from morphtrain.errors import UserError

if TYPE_CHECKING:
    from morphtrain.trainer.run import Run


class FixedBatch:
    """Set the batch size once."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def before_training(self, run: Run) -> None:
        samples = len(run.data.train)
        if self.batch_size > samples:
            raise UserError(
                f"batch_policy.batch_size={self.batch_size}: the training set has {samples} images; at most that many"
            )
        run.batch_size = self.batch_size


def build(config: schema.FixedBatch) -> FixedBatch:
    return FixedBatch(config.batch_size)
