"""The batch sizes that a policy may choose by itself."""

from __future__ import annotations

from morphtrain import world


def without_single(batch_size: int, samples: int, multiple: int = 1) -> int:
    """The largest multiple of `multiple`, up to `batch_size`, whose last batch in an epoch leaves no process one image.

    The gradient of one image is mostly noise, and batch norm cannot train on one value per channel.
    """
    batch_size -= batch_size % multiple
    while batch_size > multiple and 0 < samples % batch_size < 2 * world.size():
        batch_size -= multiple
    return batch_size


def tenth(samples: int) -> int:
    """The largest batch that a policy chooses by itself, so that an epoch keeps ten steps."""
    return samples // 10
