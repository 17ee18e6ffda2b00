"""Images kept in memory as 8-bit pixels: decoded once, cropped and mirrored with tensor operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from morphtrain import host, slices
from morphtrain.contracts import Batch
from morphtrain.data.crops import DRAWS, Crops, Normalise, mirrored, preprocessing, random_boxes, resized_crops
from morphtrain.data.image_files import EVALUATION_BATCH, ImageFiles, PictureLoader, Pictures
from morphtrain.data.images import Images
from morphtrain.preprocessing import Preprocessing


def decode(files: ImageFiles, crops: Crops, num_workers: int) -> ByteData:
    """Decode all images of `files` with `num_workers` processes; 0 for the calling process.

    Raises:
        UserError: if a file cannot be read, or a worker dies.
    """
    loader = PictureLoader(Pictures(files, crops, crops.resize), num_workers, pin_memory=False)
    edges = itertools.accumulate((0, len(files.train), len(files.val), len(files.test)))
    train, val, test = (_read(loader, range(*ends), crops.resize) for ends in itertools.pairwise(edges))
    return ByteData(train, val, test, files.classes, crops)


def _read(loader: PictureLoader, rows: Sequence[int], side: int) -> Images:
    pixels = host.empty((len(rows), 3, side, side), torch.uint8)
    labels = torch.empty(len(rows), dtype=torch.long)
    done = 0
    for images, numbers in loader.batches(rows, [None] * len(rows), slices.batches(len(rows), EVALUATION_BATCH)):
        pixels[done : done + len(numbers)], labels[done : done + len(numbers)] = images, numbers
        done += len(numbers)
    return Images(pixels, labels)


class ByteData:
    """Labelled square images (N, 3, resize, resize), uint8, in host memory, with `resize` of `crops`.

    Batches go to the device as bytes and are cropped there, so a set may be larger than the device's memory. Training
    uses random crops of the squares: unlike in `FileData`, the ends of oblong images are never seen.
    """

    def __init__(
        self,
        train: Images,
        val: Images,
        test: Images,  # may be empty
        classes: Sequence[str],
        crops: Crops,
        normalise: Normalise | None = None,
    ) -> None:
        self.train, self.val, self.test, self.classes, self.crops = train, val, test, classes, crops
        self.num_classes = len(classes)
        self._normalise = normalise or Normalise()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return 3, self.crops.image_size, self.crops.image_size

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image is resized, cropped and normalised."""
        return preprocessing(self.crops, self.classes)

    @property
    def advice(self) -> str:
        """See `Data`."""
        return "data.in_memory=false has data.num_workers processes crop the images while the network trains"

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> ByteData:
        """The same images, with batches cropped on `device`."""
        normalise = Normalise(device, memory_format)
        return ByteData(self.train, self.val, self.test, self.classes, self.crops, normalise)

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch of random crops in random order; see `Data`."""
        order = torch.randperm(len(self.train), generator=generator)
        yield from self.train_batches_of(order, batch_size, generator)

    def train_batches_of(self, rows: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Random crops of these images in this order; see `SelectableData`."""
        return self.train_slices_of(rows, slices.batches(len(rows), batch_size), generator)

    def train_slices_of(
        self, rows: torch.Tensor, parts: Sequence[slice], generator: torch.Generator
    ) -> Iterator[Batch]:
        """Those of parts of them; see `DividedData`."""
        draws = torch.rand(len(rows), DRAWS, generator=generator, dtype=torch.float64)
        boxes = random_boxes(draws, self.crops.resize, self.crops.resize, self.crops.min_scale)
        flip = mirrored(draws) & self.crops.flip
        device = self._normalise.device
        for part in parts:
            pixels = self._gathered(self.train.pixels, rows[part]).float()
            pixels = resized_crops(pixels, boxes[part].to(device), flip[part].to(device), self.crops.image_size)
            yield self._normalise(pixels), self._gathered(self.train.labels, rows[part])

    def val_batches(self) -> Iterator[Batch]:
        """The centres of the validation images, in order."""
        return self._centres(self.val)

    def test_batches(self) -> Iterator[Batch]:
        """Those of the test images."""
        return self._centres(self.test)

    def _centres(self, images: Images) -> Iterator[Batch]:
        size, start = self.crops.image_size, round((self.crops.resize - self.crops.image_size) / 2)
        for rows in torch.arange(len(images)).split(EVALUATION_BATCH):
            pixels = self._gathered(images.pixels, rows)
            centre = pixels[:, :, start : start + size, start : start + size]
            yield self._normalise(centre), self._gathered(images.labels, rows)

    def _gathered(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`values[rows]` on the device; on CUDA via pinned memory, so that the host does not wait for the copy."""
        device = self._normalise.device
        batch = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype, pin_memory=device.type == "cuda")
        torch.index_select(values, 0, rows, out=batch)
        return batch.to(device, non_blocking=True)
