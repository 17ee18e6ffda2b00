"""How the images of an epoch are cut: into batches, and every batch into a slice for each process.

    whole = batches(len(rows), batch_size)
    mine = [own(batch) for batch in whole]

Batches are the same for any number of processes. Their slices are as equal as can be, the larger ones first, as
`torch.tensor_split` cuts them. A batch of fewer images than there are processes leaves some of them without any.
"""

from __future__ import annotations

from morphtrain import world


def batches(images: int, batch_size: int) -> list[slice]:
    """The batches of an epoch of so many images; the last one may be smaller."""
    return [slice(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]


def sizes(images: int, processes: int | None = None) -> list[int]:
    """How many of the images of a batch are in each slice, by rank; a process that is `world.alone` has all of them.

    Args:
        processes: among how many they are divided; None: `world.size()`.
    """
    processes = processes or world.size()
    least, more = divmod(images, processes)
    return [least + (rank < more) for rank in range(processes)]


def own(batch: slice) -> slice:
    """This process's images of a batch; perhaps none."""
    counts = sizes(batch.stop - batch.start)
    rank = world.rank() if len(counts) > 1 else 0
    start = batch.start + sum(counts[:rank])
    return slice(start, start + counts[rank])
