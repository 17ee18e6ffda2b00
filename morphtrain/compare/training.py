"""A run as a side of a comparison: a part of an epoch, or a step, whenever it is asked for the next one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from morphtrain import interrupts
from morphtrain.compare.turns import Spent, spent
from morphtrain.data import Images
from morphtrain.evidence.interleaved import PAIRS
from morphtrain.state import Run
from morphtrain.trainer.epoch import begin_epoch, finish_epoch
from morphtrain.trainer.loop import keep_means, training_steps

# So few that a disturbance meets both sides alike, and so many that what a step takes longer after the other side's,
# whose data are in the caches, is little of a turn.
STEPS_OF_TURN = 5


def parts_of_epoch(runs: Collection[Run]) -> int:
    """In how many turns these started runs can take each epoch: whole blocks of them, or 1 if that cannot be.

    Images that are not in memory may be read ahead, in the turns of the other side, too: they would take no time.
    """
    if not all(isinstance(run.data.train, Images) for run in runs):
        return 1
    steps = min(len(run.data.train) // run.batch_size for run in runs)
    return max(1, steps // (PAIRS * STEPS_OF_TURN) * PAIRS)


def epochs(run: Run, parts: int = 1) -> Iterator[Spent | None]:
    """Train a started run to its end, each epoch in so many turns.

    `run.history` has the same records as `morphtrain.run`, without what is measured between epochs there.

    Yields:
        after the last turn of an epoch, what it adds to `train_seconds`, without the set-up; None after the others.
    """
    while not run.ended:
        interrupts.check()
        begin_epoch(run)
        yield from _train(run, parts)
        record = finish_epoch(run)
        record.pop("peak_memory_bytes", None)  # of both sides together
        names = "epoch_seconds", "morph_seconds"
        cpu_seconds = run.clock.cpu_seconds
        yield Spent(sum(record[name] for name in names), sum(cpu_seconds[name] for name in names))
    for hook in run.hooks("after_training"):
        hook(run)


def _train(run: Run, parts: int) -> Iterator[None]:
    """Train over the data once, as `train_epoch` does, in so many turns; yields between them, off the clock."""
    training = _in_parts(run, parts)
    turns: list[Spent] = []
    for number in range(parts):
        if number:
            yield
        turns.append(spent(lambda: next(training, None), run.device))
    run.clock.seconds["epoch_seconds"] = sum(turn.seconds for turn in turns)
    run.clock.cpu_seconds["epoch_seconds"] = sum(turn.cpu_seconds for turn in turns)
    keep_means(run)


def _in_parts(run: Run, parts: int) -> Iterator[None]:
    """Train over the data once; yields after each of so many equal parts but the last, of which some may be empty."""
    part = 1
    for done, _ in enumerate(training_steps(run), 1):
        number = math.ceil(run.epoch_images / run.batch_size)  # of steps; of how many images, the first one knows
        while part < parts and parts * done >= part * number:
            part += 1
            yield


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
