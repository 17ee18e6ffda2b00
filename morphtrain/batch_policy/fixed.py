"""The same batch size throughout."""

from __future__ import annotations

from morphtrain import schema
from morphtrain.method import Method
from morphtrain.state import Run


class FixedBatch(Method):
    """Set the batch size once."""

    def __init__(self, batch_size: int, max_micro_batch: int | None = None) -> None:
        self.batch_size = batch_size
        self.max_micro_batch = max_micro_batch

    def before_training(self, run: Run) -> None:
        run.set_batch(self.batch_size, self.max_micro_batch)


def build(config: schema.batch_policy.FixedBatch) -> FixedBatch:
    return FixedBatch(config.batch_size, config.max_micro_batch)
