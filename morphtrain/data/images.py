"""Labelled images in memory, batched and augmented with tensor operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from morphtrain import host, schema, slices, world
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

    def batches(self) -> Iterator[Batch]:
        """All images in order, in batches for evaluation."""
        yield from zip(self.pixels.split(EVALUATION_BATCH), self.labels.split(EVALUATION_BATCH), strict=True)

    def __getitem__(self, rows: torch.Tensor | list[int] | slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows])


@dataclass
class ImageData:
    """A training, a validation and perhaps a test set; each training sample is augmented afresh in every epoch.

    Args:
        train, val, test: the sets.
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
    test: Images | None = None
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
        test = self.test.to(device, memory_format) if self.test is not None else None
        moved = ImageData(train, val, self.num_classes, self.shift, self.flip, test, self.preprocessing)
        if self.shift and device.type == "cpu" and world.size() > 1:
            moved._padded = host.shared(moved._pad)
        return moved

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in random order, augmented: images (B, C, H, W) and labels (B,); the last batch may be smaller.

        Order and augmentation depend only on `generator`, a CPU generator.
        """
        order = torch.randperm(len(self.train), generator=generator)
        yield from self.train_batches_of(order, batch_size, generator)

    def train_batches_of(self, rows: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """These images (N,) in this order, augmented; see `SelectableData`."""
        return self.train_slices_of(rows, slices.batches(len(rows), batch_size), generator)

    def train_slices_of(
        self, rows: torch.Tensor, parts: Sequence[slice], generator: torch.Generator
    ) -> Iterator[Batch]:
        """Parts of them; see `DividedData`."""
        offsets = torch.randint(2 * self.shift + 1, (2, len(rows)), generator=generator)
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        device = self.train.pixels.device
        rows, offsets, mirrored = rows.to(device), offsets.to(device), mirrored.to(device)
        for part in parts:
            images = self._shifted(rows[part], offsets[:, part])
            if self.flip:
                images = torch.where(mirrored[part, None, None, None], images.flip(3), images)
            yield images, self.train.labels[rows[part]]

    def val_batches(self) -> Iterator[Batch]:
        """The validation set once, in order, without augmentation."""
        return self.val.batches()

    def test_batches(self) -> Iterator[Batch]:
        """The test set, likewise."""
        assert self.test is not None
        return self.test.batches()

    def _shifted(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Windows of the zero-padded images: one gather out of a strided view of all of them."""
        if self.shift == 0:
            return self.train.pixels[rows]
        if self._padded is None:
            self._padded = self._pad()
        _, h, w = self.input_shape
        windows = self._padded.unfold(2, h, 1).unfold(3, w, 1)  # (N, C, 2*shift+1, 2*shift+1, H, W)
        return windows[rows, :, offsets[0], offsets[1]]

    def _pad(self) -> torch.Tensor:
        """The training images with zeros around them: (N, C, H + 2*shift, W + 2*shift)."""
        return F.pad(self.train.pixels, [self.shift] * 4)


def normalised(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Pixels (N, C, H, W) with the mean of each channel subtracted, divided by its standard deviation."""
    return (pixels - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def divided(images: Images, share: float) -> tuple[Images, Images]:
    """The images without a random share of them, and that share; both in their order, the same for every seed."""
    held_out = drawn(len(images), share)
    return images[~held_out], images[held_out]


def drawn(number: int, share: float) -> torch.Tensor:
    """Which of so many images belong to a random share of them, at least one: (N,), bool, the same for every seed."""
    found = torch.zeros(number, dtype=torch.bool)
    found[torch.randperm(number, generator=torch.Generator().manual_seed(0))[: max(1, round(share * number))]] = True
    return found


def published(train: Images, test: Images, classes: Sequence[str], config: schema.data.Downloaded) -> ImageData:
    """Data from the 8-bit pixels of a published set, normalised by the training images' statistics.

    `data.val_share` of its training images validate, and its test images are for the test. Without such a share, its
    test images validate, and there is no test.

    Args:
        classes: their names, in the order of the labels.
    """
    test_images: Images | None = test
    if config.val_share:
        train, val = divided(train, config.val_share)
    else:
        val, test_images = test, None
    train = train[: config.train_samples]
    pixels = train.pixels.float()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))

    def prepared(images: Images) -> Images:
        return Images(normalised(images.pixels.float(), mean, std), images.labels.long())

    return ImageData(
        train=prepared(train),
        val=prepared(val),
        num_classes=len(classes),
        shift=config.shift,
        flip=config.flip,
        test=None if test_images is None else prepared(test_images),
        preprocessing=Preprocessing(mean.tolist(), std.tolist(), max_pixel=255, classes=classes),
    )
