"""Random resized crops (Szegedy et al. 2015) and centre crops, for single pictures and for batches of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as TF

LOG_RATIO = 0.28768207245178085  # ln(4/3): boxes are between 3:4 and 4:3
TRIES = 10
DRAWS = 2 * TRIES + 3  # uniform numbers that a sample takes: areas, shapes, top, left, mirrored

# Of ImageNet's training images, in 8-bit steps. Any pictures' are near, and to have those of the set at hand would take
# a pass over all its files before the first epoch.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def random_boxes(draws: torch.Tensor, height: int, width: int, min_scale: float) -> torch.Tensor:
    """Boxes (N, 4) of top, left, height, width inside an image of `height` and `width`, distributed as torchvision's.

    Of ten boxes of a random share of the area (min_scale to 1) and a random shape the first that fits; else the
    largest one in the middle.

    Args:
        draws: (N, DRAWS), uniform in [0, 1), double precision; the last column is not used here.
    """
    area = height * width * (min_scale + (1 - min_scale) * draws[:, :TRIES])  # (N, TRIES)
    ratio = torch.exp(LOG_RATIO * (2 * draws[:, TRIES : 2 * TRIES] - 1))
    sizes = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2).round().long()  # (N, TRIES, 2)
    fits = ((sizes >= 1) & (sizes <= torch.tensor([height, width]))).all(2)
    first = fits.byte().argmax(1)  # (N,); of equal values argmax takes the first
    chosen = sizes[torch.arange(len(draws)), first]  # (N, 2)
    room = torch.tensor([height, width]) - chosen
    corner = (draws[:, 2 * TRIES : 2 * TRIES + 2] * (room + 1)).long()
    boxes = torch.cat([corner, chosen], dim=1)
    return torch.where(fits.any(1, keepdim=True), boxes, torch.tensor(_largest_box(height, width)))


def _largest_box(height: int, width: int) -> tuple[int, int, int, int]:
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def mirrored(draws: torch.Tensor) -> torch.Tensor:
    """(N,), bool: the half of the samples that are flipped."""
    return draws[:, -1] < 0.5


def resized_crops(pixels: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Every image's own box, mirrored where `flip` says so, resized to `size`: (B, C, size, size).

    Bilinear between the pixels of the box, without antialiasing: a box is to be little larger than `size`.

    Args:
        pixels: (B, C, H, W), float.
        boxes: (B, 4), top, left, height, width.
        flip: (B,), bool.
    """
    steps = (torch.arange(size, device=pixels.device) + 0.5) / size  # (S,), the centres of the new pixels

    def positions(start: torch.Tensor, length: torch.Tensor, whole: int) -> torch.Tensor:
        """(B, S) in grid_sample's units, -1 to 1 from edge to edge, no nearer to the box's edge than half a pixel."""
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
    """What a network sees of a picture: 8-bit RGB squares.

    Args:
        image_size: pixels a side.
        resize: pixels of the shorter side at evaluation, before the centre crop.
        min_scale: the least share of the area that a random crop covers.
        flip: random horizontal mirroring.
    """

    image_size: int
    resize: int
    min_scale: float
    flip: bool

    def random(self, image: Image.Image, seed: int) -> torch.Tensor:
        """(3, image_size, image_size): a crop that depends on the picture and the seed alone."""
        draws = torch.rand(1, DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        box = random_boxes(draws, image.height, image.width, self.min_scale)[0].tolist()
        pixels: torch.Tensor = TF.pil_to_tensor(TF.resized_crop(image, *box, [self.image_size, self.image_size]))
        return pixels.flip(2) if self.flip and mirrored(draws).item() else pixels

    def centre(self, image: Image.Image, side: int) -> torch.Tensor:
        """(3, side, side) around torchvision's centre crop of `image_size`; `side` is at most `resize`.

        The centre crop of `image_size` of the result is that of the picture, to the pixel.
        """
        image = TF.resize(image, self.resize)
        margin = round((side - self.image_size) / 2)
        top, left = (round((length - self.image_size) / 2) - margin for length in (image.height, image.width))
        pixels: torch.Tensor = TF.pil_to_tensor(TF.crop(image, top, left, side, side))
        return pixels


class Normalise:
    """Callable: 8-bit (or float, 0 to 255) RGB pixels (B, 3, H, W) become floats on `device`, of mean 0 and std 1.

    They are in `memory_format` then.
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
        # 8-bit pixels are a quarter of the floats to copy, and leave pinned memory while the network still computes.
        pixels = pixels.to(self.device, non_blocking=True).to(memory_format=self.memory_format)
        return (pixels.float() - self.mean) / self.std
