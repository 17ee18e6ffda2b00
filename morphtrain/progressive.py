"""Smaller training images in the first epochs of a run, full ones in the last (`data.progressive`).

Howard 2018 (fast.ai, DAWNBench), and Composer's and FFCV's recipes for ImageNet since. The work of a convolution goes
with the area of its images, so that 0.7 of the side is half of it. Evaluation, and batch norm's settled statistics, see
full images throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from morphtrain.errors import UserError
from morphtrain.outputs import check_outputs
from morphtrain.schema.data import Curriculum
from morphtrain.wording import counted

MULTIPLE = 4  # pixels, of a smaller side (Composer's `size_increment`): two halvings lose no column of it


def small_size(curriculum: Curriculum, input_shape: Sequence[int]) -> tuple[int, int] | None:
    """(H, W) of the images in the first epochs, each the nearest multiple of 4 pixels; None if all are full ones."""
    if curriculum.progressive == 1:
        return None
    height, width = (_small_side(side, curriculum.progressive) for side in input_shape[1:])
    return height, width


def _small_side(side: int, scale: float) -> int:
    return min(side, max(MULTIPLE, MULTIPLE * round(scale * side / MULTIPLE)))


def resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images (B, C, H, W) as (B, C, *size), on their device and in their memory format.

    Bilinear with antialiasing, as torchvision resizes images: without it, every second pixel of a fine pattern is lost.
    """
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def check_small_images(
    curriculum: Curriculum, name: str, model: nn.Module, input_shape: Sequence[int], num_classes: int
) -> None:
    """Raise a `UserError` unless `curriculum` makes images smaller, if it says so, and model `name` takes them."""
    size = small_size(curriculum, input_shape)
    if size is None:
        return
    key, full = f"data.progressive={curriculum.progressive:g}", f"images of {input_shape[1]}x{input_shape[2]}"
    if size == tuple(input_shape[1:]):
        raise UserError(
            f"{key}: {full} would stay as they are, in steps of {counted(MULTIPLE, 'pixel')}; less, or 1, works"
        )
    try:
        check_outputs(name, model, (input_shape[0], *size), num_classes)
    except UserError as error:
        raise UserError(
            f"{key}: {full} are {size[0]}x{size[1]} at first, but {error}; a network that ends in global pooling takes "
            "any size, and data.progressive=1 needs no other"
        ) from error
