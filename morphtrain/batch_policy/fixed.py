"""The same batch size throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphtrain import schema

if TYPE_CHECKING:
    from morphtrain.trainer.run import Run


class FixedBatch:
    """Set the batch size once."""

    def __init__(self, batch_size: int, max_micro_batch: int | None = None) -> None:
        self.batch_size = batch_size
        self.max_micro_batch = max_micro_batch

    def before_training(self, run: Run) -> None:
        run.set_batch(self.batch_size, self.max_micro_batch)


def build(config: schema.FixedBatch) -> FixedBatch:
    return FixedBatch(config.batch_size, config.max_micro_batch)
