"""Random resized crops (Szegedy et al. 2015) and centre crops, of single images and of batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from morphtrain.data.transforms import Transforms
from morphtrain.preprocessing import Preprocessing

LOG_RATIO = 0.28768207245178085  # ln(4/3): aspect ratios are between 3:4 and 4:3
TRIES = 10  # boxes drawn per image, of which the first that fits is used
DRAWS = 2 * TRIES + 3  # random numbers per sample: areas, aspect ratios, top, left, mirrored

# Of ImageNet's training images, in 8-bit steps. Other photographs are similar, and measuring a set's own would need a
# pass over all its files before the first epoch.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def random_boxes(draws: torch.Tensor, height: int, width: int, min_scale: float) -> torch.Tensor:
    """Random boxes (N, 4) of top, left, height, width inside an image, distributed like torchvision's.

    Each is the first of ten boxes of random area and aspect ratio that fits into the image, or else the largest
    central one with an aspect ratio between 3:4 and 4:3.

    Args:
        draws: (N, DRAWS), uniform in [0, 1), double precision; the last column is not used here.
        height, width: of the image, in pixels.
        min_scale: smallest area of a box, as a share of the image's.
    """
    area = height * width * (min_scale + (1 - min_scale) * draws[:, :TRIES])  # (N, TRIES)
    ratio = torch.exp(LOG_RATIO * (2 * draws[:, TRIES : 2 * TRIES] - 1))
    sizes = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2).round().long()  # (N, TRIES, 2)
    fits = ((sizes >= 1) & (sizes <= torch.tensor([height, width]))).all(2)
    first = fits.byte().argmax(1)  # (N,); argmax returns the first of equal values
    chosen = sizes[torch.arange(len(draws)), first]  # (N, 2)
    room = torch.tensor([height, width]) - chosen
    corner = (draws[:, 2 * TRIES : 2 * TRIES + 2] * (room + 1)).long()
    boxes = torch.cat([corner, chosen], dim=1)
    return torch.where(fits.any(1, keepdim=True), boxes, torch.tensor(_largest_box(height, width)))


def _largest_box(height: int, width: int) -> tuple[int, int, int, int]:
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def mirrored(draws: torch.Tensor) -> torch.Tensor:
    """Which samples to mirror, about half of them: (N,), bool."""
    return draws[:, -1] < 0.5


def resized_crops(pixels: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Each image's own box, mirrored where `flip` is true, resized to `size`: (B, C, size, size).

    Bilinear between the pixels of the box, without antialiasing, so boxes should not be much larger than `size`.

    Args:
        pixels: (B, C, H, W), float.
        boxes: (B, 4), top, left, height, width.
        flip: (B,), bool.
        size: pixels per side of the result.
    """
    steps = (torch.arange(size, device=pixels.device) + 0.5) / size  # (S,), centres of the new pixels, 0 to 1

    def positions(start: torch.Tensor, length: torch.Tensor, whole: int) -> torch.Tensor:
        """(B, S) in grid_sample's units (-1 to 1, edge to edge), at least half a pixel from the edges of the box."""
        inside = (steps * length[:, None]).clamp(min=0.5).minimum(length[:, None] - 0.5)
        return 2 * (start[:, None] + inside) / whole - 1

    top, left, height, width = boxes.float().unbind(1)
    y = positions(top, height, pixels.shape[2])
    x = positions(left, width, pixels.shape[3])
    x = torch.where(flip[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)  # (B, S, S, 2)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Crops:
    """Cuts what a network sees out of an image: 8-bit RGB squares.

    Args:
        image_size: pixels per side.
        resize: pixels of the shorter side at evaluation, before the centre crop.
        min_scale: smallest share of the area that a random crop covers.
        flip: random horizontal mirroring.
        transforms: of random crops, after all that; None: none.
    """

    image_size: int
    resize: int
    min_scale: float
    flip: bool
    transforms: Transforms | None = None

    def random(self, image: Image.Image, seed: int) -> torch.Tensor:
        """A random crop (3, image_size, image_size), transformed, that depends only on the image and the seed."""
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(1, DRAWS, generator=generator, dtype=torch.float64)
        box = random_boxes(draws, image.height, image.width, self.min_scale)[0].tolist()
        pixels: torch.Tensor = TF.pil_to_tensor(TF.resized_crop(image, *box, [self.image_size, self.image_size]))
        if self.flip and mirrored(draws).item():
            pixels = pixels.flip(2)
        return pixels if self.transforms is None else self.transforms(pixels, generator)

    def centre(self, image: Image.Image, side: int) -> torch.Tensor:
        """A central square (3, side, side) of the resized image; `side` is at most `resize`.

        The centre crop of `image_size` of this square is exactly torchvision's of the resized image.
        """
        image = TF.resize(image, self.resize)
        margin = round((side - self.image_size) / 2)
        top, left = (round((length - self.image_size) / 2) - margin for length in (image.height, image.width))
        pixels: torch.Tensor = TF.pil_to_tensor(TF.crop(image, top, left, side, side))
        return pixels


def preprocessing(crops: Crops, classes: Sequence[str]) -> Preprocessing:
    """What an image goes through at evaluation; `classes` are their names."""
    return Preprocessing(MEAN, STD, max_pixel=255, resize=crops.resize, classes=classes)


class Normalise:
    """Callable that turns RGB pixels (B, 3, H, W), 0 to 255, into floats of about mean 0 and std 1.

    Args:
        device: of the result.
        memory_format: of the result.
    """

    def __init__(
        self,
        device: torch.device | None = None,  # None: the CPU
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.memory_format = memory_format
        self.mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(3, 1, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        # Copy 8-bit pixels, a quarter of the bytes of floats. From pinned memory this runs while the network computes.
        pixels = pixels.to(self.device, non_blocking=True).to(memory_format=self.memory_format)
        return (pixels.float() - self.mean) / self.std
