"""Which batch sizes a policy may choose of its own accord."""

from __future__ import annotations


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
