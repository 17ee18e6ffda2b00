"""The learning rate for a batch that has grown."""

from __future__ import annotations

import logging
from collections.abc import Callable

from morphtrain.state import Run

log = logging.getLogger(__name__)

# The factor on the learning rate for a batch `ratio` times as large as the first.
LR_SCALINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda ratio: ratio,  # Goyal et al. 2017, arXiv 1706.02677
    "sqrt": lambda ratio: ratio**0.5,  # Hoffer et al. 2017, arXiv 1705.08741
    "none": lambda ratio: 1.0,  # Smith et al. 2018, arXiv 1711.00489
}


def grow(run: Run, batch_size: int, first: int, lr_scaling: str, warmup_epochs: float, reason: str) -> None:
    """Continue with `batch_size` images per step and the learning rate that suits it.

    Args:
        first: the batch size that `optimizer.lr` is meant for.
        lr_scaling: a key of `LR_SCALINGS`.
        warmup_epochs: over which the learning rate moves linearly to its new value.
        reason: for the log.
    """
    factor = LR_SCALINGS[lr_scaling](batch_size / first)
    log.info("batch size %d -> %d (%s); learning rate times %.3g", run.batch_size, batch_size, reason, factor)
    run.set_batch(batch_size, run.micro_batch)
    run.scale_learning_rate(factor, warmup_epochs)
