"""Made-up images, for tests and for timing without a data set."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.data.images import ImageData, Images
from morphtrain.preprocessing import Preprocessing


def build(config: schema.data.Synthetic) -> ImageData:
    """One random smooth pattern per class, plus noise; the same images for every seed of the run."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.num_classes, config.in_channels, 4, 4)
    size = config.image_size
    patterns = F.interpolate(torch.randn(shape, generator=generator), size=size, mode="bicubic")
    patterns = patterns / patterns.std((1, 2, 3), keepdim=True)

    def draw(count: int) -> Images:
        labels = torch.randint(config.num_classes, (count,), generator=generator)
        noise = torch.randn(count, config.in_channels, size, size, generator=generator)
        return Images(patterns[labels] + config.noise * noise, labels)

    train, val, test = (draw(count) for count in (config.train_samples, config.val_samples, config.val_samples))
    as_drawn = Preprocessing([0.0] * config.in_channels, [1.0] * config.in_channels, max_pixel=1)
    return ImageData(train, val, config.num_classes, test=test, preprocessing=as_drawn)
