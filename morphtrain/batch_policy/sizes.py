"""The batch sizes that a policy may choose by itself."""

from __future__ import annotations


def without_single(batch_size: int, samples: int, multiple: int = 1) -> int:
    """The largest multiple of `multiple`, up to `batch_size`, that does not leave one image for an epoch's last batch.

    The gradient of one image is mostly noise, and batch norm cannot train on one value per channel.
    """
    batch_size -= batch_size % multiple
    while batch_size > multiple and samples % batch_size == 1:
        batch_size -= multiple
    return batch_size


def tenth(samples: int) -> int:
    """The largest batch that a policy chooses by itself, so that an epoch keeps ten steps."""
    return samples // 10
