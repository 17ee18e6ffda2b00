"""Images that stay on disk: decoded and cropped by worker processes while the network trains on earlier batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from morphtrain import interrupts, slices
from morphtrain.contracts import Batch
from morphtrain.data.crops import Crops, Normalise, preprocessing
from morphtrain.errors import UserError, first_line
from morphtrain.preprocessing import Preprocessing

EVALUATION_BATCH = 64

# What PIL raises for files that are corrupt, truncated, not images, or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

SIXTEEN_BITS_AS_I = ("PNG", "PPM")  # formats whose 16 bits PIL may give as 32

Item = tuple[int, int | None]  # row of the file, and seed of its random crop; None for the centre crop
Sample = tuple[torch.Tensor, int] | str  # an 8-bit image and its label, or an error message


class Stored(Protocol):
    """An image file that is a part of something else; as text, where it is there."""

    def open(self) -> BinaryIO:
        """Its bytes.

        Raises:
            ValueError: if there is none.
        """


Source = str | Stored  # the path of a file, or a part of one


@dataclass(frozen=True)
class ImageFiles:
    """Names of the classes, and the images in `data.root` with their labels."""

    root: str
    classes: Sequence[str]
    train: Sequence[tuple[Source, int]]
    val: Sequence[tuple[Source, int]]
    test: Sequence[tuple[Source, int]] = ()

    def __len__(self) -> int:
        return len(self.train) + len(self.val) + len(self.test)

    def digest(self) -> str:
        """The same for the same files below `root`, wherever that is."""
        root, found = str(Path(self.root).expanduser()), hashlib.sha256()
        for part in (self.train, self.val, self.test):
            for source, label in part:
                found.update(f"{str(source).removeprefix(root)}\0{label}\0".encode(errors="surrogateescape"))
            found.update(b"\0")
        return found.hexdigest()


class Pictures(Dataset[Sample]):
    """All images as 8-bit tensors: the training set, the validation set, the test set.

    A random crop is (3, image_size, image_size), a central square (3, side, side). An unreadable file gives an error
    message instead: an error raised in a worker would come with a traceback.
    """

    def __init__(self, files: ImageFiles, crops: Crops, side: int) -> None:
        self.root = files.root
        self.samples = [*files.train, *files.val, *files.test]
        self.crops = crops
        self.side = side

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: Item) -> Sample:
        row, seed = item
        source, label = self.samples[row]
        try:
            image = rgb(source)
        except UNREADABLE as error:
            return f"data.root={self.root}: cannot read the image {source} ({error}); replace or remove it"
        try:
            return (self.crops.centre(image, self.side) if seed is None else self.crops.random(image, seed)), label
        except UserError as error:  # of a transform
            return str(error)


def rgb(source: Source) -> Image.Image:
    """An image file as 8-bit RGB; of 16-bit greyscale (X-rays, depth) the upper 8 bits, as PIL reads 16-bit colours.

    Raises:
        ValueError: for grey values of 32 bits, whose range no file says; and what PIL raises for files it cannot read.
    """
    with Image.open(source if isinstance(source, str) else source.open()) as image:
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS_AS_I)
        if sixteen:
            return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("it has 32 bits a pixel, whose range is not known; 8 or 16 bits work")
        return image.convert("RGB")


class BatchPlan(Sampler[list[Item]]):
    """A batch sampler whose batches are set before every pass, so that one loader can keep its workers for all."""

    def __init__(self) -> None:
        self.rows: Sequence[int] = ()
        self.seeds: Sequence[int | None] = ()
        self.parts: Sequence[slice] = ()

    def __iter__(self) -> Iterator[list[Item]]:
        for part in self.parts:
            yield list(zip(self.rows[part], self.seeds[part], strict=True))

    def __len__(self) -> int:
        return len(self.parts)


class PictureLoader:
    """A `DataLoader` that is told before every pass what to read, and keeps its workers from one pass to the next."""

    def __init__(self, pictures: Pictures, num_workers: int, pin_memory: bool) -> None:
        self.pictures, self.num_workers, self.pin_memory = pictures, num_workers, pin_memory
        self.plan = BatchPlan()
        self.loader = self._new_loader()

    def _new_loader(self) -> DataLoader[Sample]:
        return DataLoader(
            self.pictures,
            batch_sampler=self.plan,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # the loader draws from it in every pass, not from the run's random state
        )

    def batches(self, rows: Sequence[int], seeds: Sequence[int | None], parts: Sequence[slice]) -> Iterator[Batch]:
        """8-bit images (B, 3, S, S) and labels (B,): those of each of these parts of `rows`, none of which is empty.

        Args:
            seeds: of the random crops.

        Raises:
            UserError: if a file cannot be read, or a worker dies.
        """
        self.plan.rows, self.plan.seeds, self.plan.parts = rows, seeds, parts
        failure = ""
        try:
            for batch in self.loader:
                interrupts.check()
                if isinstance(batch, str):
                    failure = batch
                    break
                yield batch
        except RuntimeError as error:
            interrupts.check()  # workers may have got the signal, too
            if "DataLoader worker" not in str(error):
                raise
            failure = (
                f"data.num_workers={self.num_workers}: a worker died ({first_line(error)}), perhaps for lack of "
                "(shared) memory; try fewer workers, or 0"
            )
        if failure:
            # Replacing the loader ends its workers now: the garbage collector would later wait for each in vain.
            self.loader = self._new_loader()
            raise UserError(failure)


def _begin_worker(number: int) -> None:
    interrupts.leave_group()


def collate(samples: list[Sample]) -> Batch | str:
    """Stack samples into one batch, or return the first error message among them."""
    for sample in samples:
        if isinstance(sample, str):
            return sample
    batch: Batch = tuple(default_collate(samples))
    return batch


class FileData:
    """Images in folders, read again in every epoch.

    Args:
        files: the images.
        crops: cuts what the network sees out of each image.
        num_workers: processes that read; 0 for the calling process.
        normalise: puts batches on the device; None for the CPU.
    """

    def __init__(self, files: ImageFiles, crops: Crops, num_workers: int, normalise: Normalise | None = None) -> None:
        self.train, self.val, self.test, self.num_classes = files.train, files.val, files.test, len(files.classes)
        self.crops = crops
        self._files = files
        self._normalise = normalise or Normalise()
        pin_memory = self._normalise.device.type == "cuda"
        self._loader = PictureLoader(Pictures(files, crops, crops.image_size), num_workers, pin_memory)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return 3, self.crops.image_size, self.crops.image_size

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image is resized, cropped and normalised."""
        return preprocessing(self.crops, self._files.classes)

    @property
    def advice(self) -> str:
        """See `Data`."""
        return (
            f"more data.num_workers (now {self._loader.num_workers}) read faster where there are cores for them, "
            "smaller files decode faster, and data.in_memory=true decodes them once"
        )

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> FileData:
        """The same files, with batches on `device`; on CUDA they are copied from pinned memory while it computes."""
        return FileData(self._files, self.crops, self._loader.num_workers, Normalise(device, memory_format))

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch of random crops in random order, the same for any number of workers; see `Data`."""
        order = torch.randperm(len(self.train), generator=generator)
        yield from self.train_batches_of(order, batch_size, generator)

    def train_batches_of(self, rows: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Random crops of these images in this order; see `SelectableData`."""
        return self.train_slices_of(rows, slices.batches(len(rows), batch_size), generator)

    def train_slices_of(
        self, rows: torch.Tensor, parts: Sequence[slice], generator: torch.Generator
    ) -> Iterator[Batch]:
        """Those of parts of them; see `DividedData`."""
        seeds = torch.randint(2**63 - 1, (len(rows),), generator=generator)
        full = [part for part in parts if part.start < part.stop]
        batches = self._batches(rows.tolist(), seeds.tolist(), full)
        for part in parts:
            yield next(batches) if part.start < part.stop else self._no_images()

    def val_batches(self) -> Iterator[Batch]:
        """The centres of the validation images, in order."""
        return self._centres("val")

    def test_batches(self) -> Iterator[Batch]:
        """Those of the test images."""
        return self._centres("test")

    def own_batches(self, part: str) -> Iterator[Batch]:
        """This process's images of the batches of `val_batches` ("val") or `test_batches`, where it has any."""
        return self._centres(part, slices.own)

    def _centres(self, part: str, cut: Callable[[slice], slice] = lambda batch: batch) -> Iterator[Batch]:
        held_out = self.val if part == "val" else self.test
        first = len(self.train) + (len(self.val) if part == "test" else 0)
        rows = range(first, first + len(held_out))
        parts = [cut(batch) for batch in slices.batches(len(rows), EVALUATION_BATCH)]
        return self._batches(rows, [None] * len(rows), [own for own in parts if own.start < own.stop])

    def _batches(self, rows: Sequence[int], seeds: Sequence[int | None], parts: Sequence[slice]) -> Iterator[Batch]:
        for pixels, labels in self._loader.batches(rows, seeds, parts):
            yield self._normalise(pixels), labels.to(self._normalise.device, non_blocking=True)

    def _no_images(self) -> Batch:
        labels = torch.zeros(0, dtype=torch.long, device=self._normalise.device)
        return torch.zeros(0, *self.input_shape, device=self._normalise.device), labels
