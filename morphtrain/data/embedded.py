"""Images that come with a package: no files to keep, no download, and one split for every seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from morphtrain import schema
from morphtrain.data.images import ImageData, Images, normalised
from morphtrain.preprocessing import Preprocessing


def divided_once(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    held_out: int,
    config: schema.data.Embedded,
    *,
    max_pixel: float,
    classes: Sequence[str],
    resize: int | None = None,
) -> ImageData:
    """Data of which `held_out` images are not trained on: the same ones for every seed, stratified by class.

    `config.test_share` of those held out are for the test, the others validate. All are normalised by the mean and the
    standard deviation of the training images.

    Args:
        pixels: (N, 1, H, W), float, 0 to `max_pixel`.
        labels: (N,), int64.
        classes: their names, in the order of the labels.
        resize: the side to which the images have been resized; None if they have not been.
    """
    from sklearn.model_selection import train_test_split

    def parted(rows: list[int], count: float) -> list[list[int]]:
        parts: list[list[int]] = train_test_split(rows, test_size=count, stratify=labels[rows], random_state=0)
        return parts

    test = None
    train, val = parted(list(range(len(labels))), held_out)
    if config.test_share:
        val, test = parted(val, config.test_share)
    mean, std = pixels[train].mean(), pixels[train].std()
    images = Images(normalised(pixels, mean, std), labels)
    return ImageData(
        train=images[train],
        val=images[val],
        num_classes=len(classes),
        shift=config.shift,
        test=None if test is None else images[test],
        preprocessing=Preprocessing([mean.item()], [std.item()], max_pixel=max_pixel, resize=resize, classes=classes),
    )
