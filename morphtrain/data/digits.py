"""scikit-learn's handwritten digits, which are bundled with the library and need no download."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.data.images import ImageData, Images, normalised
from morphtrain.preprocessing import Preprocessing

HELD_OUT = 360  # of 1797; the same images for every seed


def build(config: schema.data.Digits) -> ImageData:
    """1437 training and 360 held-out images (stratified), upsampled from 8x8 to `image_size`.

    `test_share` of those held out are for the test, the others validate.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None]  # (N, 1, 8, 8)
    pixels = F.interpolate(pixels, size=config.image_size, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()

    def parted(rows: list[int], held_out: float) -> list[list[int]]:
        parts: list[list[int]] = train_test_split(rows, test_size=held_out, stratify=labels[rows], random_state=0)
        return parts

    test = None
    train, val = parted(list(range(len(labels))), HELD_OUT)
    if config.test_share:
        val, test = parted(val, config.test_share)
    mean, std = pixels[train].mean(), pixels[train].std()
    images = Images(normalised(pixels, mean, std), labels)
    names = [str(digit) for digit in digits.target_names]
    return ImageData(
        train=images[train],
        val=images[val],
        num_classes=10,
        shift=config.shift,
        test=None if test is None else images[test],
        preprocessing=Preprocessing([mean.item()], [std.item()], max_pixel=16, resize=config.image_size, classes=names),
    )
