"""scikit-learn's handwritten digits, which are bundled with the library and need no download."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.data.embedded import divided_once
from morphtrain.data.images import ImageData

HELD_OUT = 360  # of 1797


def build(config: schema.data.Digits) -> ImageData:
    """1437 training and 360 held-out images, upsampled from 8x8 to `image_size`; see `divided_once`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None]  # (N, 1, 8, 8)
    pixels = F.interpolate(pixels, size=config.image_size, mode="bilinear", align_corners=False)
    return divided_once(
        pixels,
        torch.from_numpy(digits.target).long(),
        HELD_OUT,
        config,
        max_pixel=16,
        classes=[str(digit) for digit in digits.target_names],
        resize=config.image_size,
    )
