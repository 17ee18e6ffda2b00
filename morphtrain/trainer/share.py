"""What each process trains on: the images of its slice (`morphtrain.slices`) of every batch. One has all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch

from morphtrain import slices, world
from morphtrain.contracts import Batch, SelectableData
from morphtrain.part_checks import is_divided
from morphtrain.state import Run


@dataclass(frozen=True)
class Share:
    """This process's images of a batch.

    Attributes:
        images: (B, C, H, W); there may be none.
        labels: (B,); once images are mixed, their shares of the classes (B, classes).
        whole: how many images the batch has in all processes.
        largest: how many of them the largest share has.
        rows: (B,), which training images they are, whose scores InfoBatch keeps; None without it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    whole: int
    largest: int
    rows: torch.Tensor | None = None


def training_shares(run: Run) -> Iterator[Share]:
    """Those of this epoch, of all training images or of those that InfoBatch chooses.

    The batches, their order and their augmentation are those of one process.
    """
    generator = run.generator(run.epoch)
    if run.infobatch is None:
        return _shares(_cut(run, None, generator))
    rows = run.infobatch.choose(run.epoch, generator, run.leaves_single)
    return _shares(_cut(run, rows, generator), run.infobatch.rows)


def _shares(batches: Iterator[tuple[Batch, int]], rows: torch.Tensor | None = None) -> Iterator[Share]:
    given = 0
    for (images, labels), whole in batches:
        own = None if rows is None else rows[slices.own(slice(given, given + whole))]
        yield Share(images, labels, whole, slices.sizes(whole)[0], own)
        given += whole


def _cut(run: Run, rows: torch.Tensor | None, generator: torch.Generator) -> Iterator[tuple[Batch, int]]:
    """This process's images of every batch of these training images, and how many images the batch has.

    Args:
        rows: in their order; None for all images in the order of the epoch.
        generator: has drawn `rows`, if they are given.
    """
    data, batch_size = run.data, run.batch_size
    if world.size() > 1 and is_divided(data):
        if rows is None:
            rows = run.order(generator)
        whole = slices.batches(len(rows), batch_size)
        made = data.train_slices_of(rows, [slices.own(batch) for batch in whole], generator)
        yield from zip(made, (batch.stop - batch.start for batch in whole), strict=True)
        return
    batches = (
        run.all_batches() if rows is None else cast(SelectableData, data).train_batches_of(rows, batch_size, generator)
    )
    for images, labels in batches:
        own = slices.own(slice(0, len(labels)))
        yield (images[own], labels[own]), len(labels)
