"""Labelled images in memory, batched and augmented with tensor operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from morphtrain.contracts import Batch
from morphtrain.preprocessing import Preprocessing

EVALUATION_BATCH = 512


@dataclass
class Images:
    """`pixels` (N, C, H, W), float and normalised (in `image_bytes`, uint8); `labels` (N,), int64."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Images:
        """The same images on `device`, with pixels in `memory_format`."""
        return Images(self.pixels.to(device, memory_format=memory_format), self.labels.to(device))


@dataclass
class ImageData:
    """A training and a held-out set; each training sample is augmented afresh in every epoch.

    Args:
        train, val: the two sets.
        num_classes: labels are 0 .. num_classes - 1.
        shift: random translation by at most this many pixels in each direction, padded with zeros (the mean).
        flip: random horizontal mirroring.
        preprocessing: how the images were normalised; None if that is not known.
    """

    train: Images
    val: Images
    num_classes: int
    shift: int = 0
    flip: bool = False
    preprocessing: Preprocessing | None = None
    _padded: torch.Tensor | None = field(default=None, repr=False)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        _, c, h, w = self.train.pixels.shape
        return c, h, w

    @property
    def advice(self) -> str:
        """See `Data`."""
        return "a larger batch_policy.batch_size gathers and augments more images at once"

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> ImageData:
        """The same data on `device`, where augmentation then runs too; batches have the set's memory format."""
        train, val = self.train.to(device, memory_format), self.val.to(device, memory_format)
        return ImageData(train, val, self.num_classes, self.shift, self.flip, self.preprocessing)

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in random order, augmented: images (B, C, H, W) and labels (B,); the last batch may be smaller.

        Order and augmentation depend only on `generator`, a CPU generator.
        """
        order = torch.randperm(len(self.train), generator=generator)
        offsets = torch.randint(2 * self.shift + 1, (2, len(order)), generator=generator)
        mirrored = torch.rand(len(order), generator=generator) < 0.5
        device = self.train.pixels.device
        order, offsets, mirrored = order.to(device), offsets.to(device), mirrored.to(device)
        for i in range(0, len(order), batch_size):
            batch = slice(i, i + batch_size)
            images = self._shifted(order[batch], offsets[:, batch])
            if self.flip:
                images = torch.where(mirrored[batch, None, None, None], images.flip(3), images)
            yield images, self.train.labels[order[batch]]

    def val_batches(self) -> Iterator[Batch]:
        """The held-out set once, in order, without augmentation."""
        yield from zip(self.val.pixels.split(EVALUATION_BATCH), self.val.labels.split(EVALUATION_BATCH), strict=True)

    def _shifted(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Windows of the zero-padded images: one gather out of a strided view of all of them."""
        if self.shift == 0:
            return self.train.pixels[rows]
        if self._padded is None:
            self._padded = F.pad(self.train.pixels, [self.shift] * 4)
        _, h, w = self.input_shape
        windows = self._padded.unfold(2, h, 1).unfold(3, w, 1)  # (N, C, 2*shift+1, 2*shift+1, H, W)
        return windows[rows, :, offsets[0], offsets[1]]


def normalised(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Pixels (N, C, H, W) with the mean of each channel subtracted, divided by its standard deviation."""
    return (pixels - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def from_bytes(
    train: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor],
    classes: Sequence[str],
    train_samples: int | None,
    shift: int,
    flip: bool,
) -> ImageData:
    """Data from 8-bit pixels (N, C, H, W) and labels (N,), normalised by the training set's statistics.

    Args:
        train, val: pixels and labels.
        classes: their names, in the order of the labels.
        train_samples: use only this many training images, the first ones; None for all.
        shift, flip: see `ImageData`.
    """
    pixels, labels = train[0][:train_samples].float(), train[1][:train_samples]
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return ImageData(
        train=Images(normalised(pixels, mean, std), labels.long()),
        val=Images(normalised(val[0].float(), mean, std), val[1].long()),
        num_classes=len(classes),
        shift=shift,
        flip=flip,
        preprocessing=Preprocessing(mean.tolist(), std.tolist(), max_pixel=255, classes=classes),
    )
