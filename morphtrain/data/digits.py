"""scikit-learn's handwritten digits, which are bundled with the library and need no download."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.data.images import ImageData, Images, normalised
from morphtrain.preprocessing import Preprocessing

HELD_OUT = 360  # of 1797; the same images for every seed


def build(config: schema.data.Digits) -> ImageData:
    """1437 training and 360 held-out images (stratified), upsampled from 8x8 to `image_size`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None]  # (N, 1, 8, 8)
    pixels = F.interpolate(pixels, size=config.image_size, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    rows = train_test_split(range(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    train, val = (torch.tensor(part) for part in rows)
    mean, std = pixels[train].mean(), pixels[train].std()
    pixels = normalised(pixels, mean, std)
    names = [str(digit) for digit in digits.target_names]
    return ImageData(
        train=Images(pixels[train], labels[train]),
        val=Images(pixels[val], labels[val]),
        num_classes=10,
        shift=config.shift,
        preprocessing=Preprocessing([mean.item()], [std.item()], max_pixel=16, resize=config.image_size, classes=names),
    )
