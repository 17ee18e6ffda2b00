"""What growing policies share: the learning rate that goes with a larger batch, and which sizes to avoid."""

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
    """Go on with `batch_size` images in a step, and with the learning rate that suits it.

    Args:
        first: the batch size that `optimizer.lr` is meant for.
        lr_scaling: a key of `LR_SCALINGS`.
        warmup_epochs: in which the learning rate moves, linearly, from what it would be without the change.
        reason: for the log.
    """
    factor = LR_SCALINGS[lr_scaling](batch_size / first)
    log.info("batch size %d -> %d (%s); learning rate times %.3g", run.batch_size, batch_size, reason, factor)
    run.set_batch(batch_size, run.micro_batch)
    run.scale_learning_rate(factor, warmup_epochs)


def without_single(batch_size: int, samples: int, multiple: int = 1) -> int:
    """The largest multiple up to `batch_size` that does not leave an epoch's last batch a single image.

    A gradient of one image is noise, and where batch norm has one value a channel there is none at all.
    """
    batch_size -= batch_size % multiple
    while batch_size > multiple and samples % batch_size == 1:
        batch_size -= multiple
    return batch_size


def tenth(samples: int) -> int:
    """The most a policy takes of the training set of its own accord: an epoch keeps ten steps."""
    return samples // 10
