"""A run as a side of a comparison: an epoch, or a step, whenever it is asked for the next one."""

from __future__ import annotations

from collections.abc import Iterator

from morphtrain import interrupts
from morphtrain.compare.turns import Spent, spent
from morphtrain.state import Run
from morphtrain.trainer.epoch import begin_epoch, finish_epoch
from morphtrain.trainer.loop import train_epoch, training_steps


def epochs(run: Run) -> Iterator[Spent]:
    """Train a started run to its end; yields what each epoch adds to `train_seconds`, without the set-up.

    `run.history` has the same records as `morphtrain.run`, without what is measured between epochs there.
    """
    while not run.ended:
        interrupts.check()
        begin_epoch(run)
        train_epoch(run)
        record = finish_epoch(run)
        record.pop("peak_memory_bytes", None)  # of both sides together
        parts = "epoch_seconds", "morph_seconds"
        cpu_seconds = run.clock.cpu_seconds
        yield Spent(sum(record[part] for part in parts), sum(cpu_seconds[part] for part in parts))
    for hook in run.hooks("after_training"):
        hook(run)


def steps(run: Run) -> Iterator[Spent]:
    """What each training step takes on a whole batch, with all of its hooks; the network keeps its structure.

    What follows an epoch, such as pruning and evaluation, is left out.
    """
    while run.epoch < run.config.epochs:
        begin_epoch(run)
        training, done = training_steps(run), 0
        while done == 0 or (done + 1) * run.batch_size <= run.epoch_images:  # how many these are, the first step knows
            yield spent(lambda training=training: next(training), run.device)  # type: ignore[misc]
            done += 1
