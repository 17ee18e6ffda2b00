"""What a run needs of its data, wherever they live."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Protocol

import torch

Batch = tuple[torch.Tensor, torch.Tensor]  # (B, C, H, W), float and normalised; (B,), int64


class Data(Protocol):
    """A training and a held-out set of labelled images; labels are 0 .. num_classes - 1."""

    num_classes: int

    @property
    def train(self) -> Sized:
        """The training set; its length is the number of images in an epoch."""

    @property
    def val(self) -> Sized:
        """The held-out set."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""

    @property
    def advice(self) -> str:
        """What to change where a run waits for these data."""

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Data:
        """The same data, whose batches are made on `device`, and their images in `memory_format`."""

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in random order, augmented; the last batch may be smaller.

        Order and augmentation depend on `generator` (a CPU generator) alone, and on no `batch_size`.
        """

    def val_batches(self) -> Iterator[Batch]:
        """The held-out set once, in order."""
