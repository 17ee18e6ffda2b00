"""A data set of one's own: filled squares, discs and crosses, drawn by a seed."""

from __future__ import annotations

import torch

from morphtrain.data import ImageData, Images
from morphtrain.preprocessing import Preprocessing


def shapes(images: int, image_size: int, noise: float = 0.3) -> ImageData:
    """`images` for training and a quarter as many held out, (1, image_size, image_size), in 3 classes."""
    generator = torch.Generator().manual_seed(0)
    return ImageData(
        train=draw(images, image_size, noise, generator),
        val=draw(images // 4, image_size, noise, generator),
        num_classes=3,
        preprocessing=Preprocessing([0.0], [1.0], max_pixel=1, classes=["square", "disc", "cross"]),
    )


def draw(count: int, size: int, noise: float, generator: torch.Generator) -> Images:
    labels = torch.randint(3, (count,), generator=generator)
    centre = size * (0.35 + 0.3 * torch.rand(count, 2, 1, 1, generator=generator))
    radius = size * (0.15 + 0.15 * torch.rand(count, 1, 1, generator=generator))
    positions = torch.arange(size, dtype=torch.float)
    dy, dx = (positions[:, None] - centre[:, 0]).abs(), (positions - centre[:, 1]).abs()  # (count, size, size)
    inside = torch.stack(
        [
            (torch.maximum(dy, dx) <= radius),  # square
            (dy.square() + dx.square()).sqrt() <= radius,  # disc
            (torch.minimum(dy, dx) <= radius / 4) & (torch.maximum(dy, dx) <= radius),  # cross
        ]
    )
    pixels = inside[labels, torch.arange(count)].float()[:, None]  # (count, 1, size, size)
    return Images(pixels + noise * torch.randn(pixels.shape, generator=generator), labels)
