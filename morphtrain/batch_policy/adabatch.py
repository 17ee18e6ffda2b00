"""Larger batches as training goes on, instead of smaller learning rates.

Smith et al. 2018 (arXiv 1711.00489): gradient noise scales with lr / batch size, so raising the batch size does what
lowering the learning rate does, in fewer steps. Devarakonda et al. 2017 (AdaBatch, arXiv 1712.02029) do both.
"""

from __future__ import annotations

from morphtrain import schema
from morphtrain.batch_policy.learning_rate import grow
from morphtrain.batch_policy.sizes import tenth, without_single
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.state import Run
from morphtrain.wording import counted


class AdaBatch(Method):
    """Multiply the batch size every few epochs, up to a limit."""

    def __init__(self, config: schema.batch_policy.AdaBatch) -> None:
        self.config = config

    def before_training(self, run: Run) -> None:
        config, samples = self.config, len(run.data.train)
        if config.max_batch_size is not None and config.max_batch_size > samples:
            raise UserError(
                f"batch_policy.max_batch_size={config.max_batch_size}: the training set has {samples} images; "
                "at most that many, or null for a tenth of them"
            )
        if run.epoch == 0:
            run.set_batch(config.batch_size, config.max_micro_batch)

    def after_epoch(self, run: Run) -> None:
        config, samples = self.config, len(run.data.train)
        if run.epoch % config.every or run.epoch == run.config.epochs:
            return
        limit = config.max_batch_size or tenth(samples)
        batch_size = without_single(min(run.batch_size * config.factor, limit), samples)
        if batch_size > run.batch_size:
            reason = f"times {config.factor} every {counted(config.every, 'epoch')}, up to {limit}"
            grow(run, batch_size, config.batch_size, config.lr_scaling, config.warmup_epochs, reason)


def build(config: schema.batch_policy.AdaBatch) -> AdaBatch:
    return AdaBatch(config)
