"""The learning rate range test (Smith 2015, arXiv 1506.01186): the loss while the rate rises exponentially."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from morphtrain import interrupts, schema
from morphtrain.errors import UserError
from morphtrain.evidence.plots import plot_learning_rates
from morphtrain.files import write_atomically
from morphtrain.memory_limit import named_if_out_of_memory
from morphtrain.state import Run
from morphtrain.trainer.epoch import begin_epoch, start
from morphtrain.trainer.loop import training_steps
from morphtrain.trainer.train import new_run, prepared, sizes

SMOOTHING = 0.95  # of the moving average of the loss, without its bias towards zero
DIVERGED = 4.0  # times the lowest smoothed loss: nothing is learnt at such rates, as in fastai's finder
SHARE = 0.1  # of the rate with the lowest loss, which is suggested
LEAST_STEPS = 20


class Step(NamedTuple):
    """A training step: its learning rate, the loss of its batch, and the moving average of the loss until then."""

    learning_rate: float
    loss: float
    smoothed: float


def show(config: schema.Config, lowest: float, highest: float, steps: int, directory: Path) -> None:
    """Make the test, write `lr_finder.csv` and `lr_finder.png` to `directory`, and print what it suggests.

    Raises:
        UserError: for a mistake that the user can fix, and if the test shows nothing.
    """
    schema.check(steps >= LEAST_STEPS, "--steps", steps, f"{LEAST_STEPS} or more")
    schema.check(0 < lowest < highest < math.inf, "--from", lowest, f"above 0 and below --to {highest:g}")
    schema.check(directory.is_dir() or not directory.exists(), "--output", directory, "a directory, new or not")
    with prepared(config) as slot, named_if_out_of_memory(sizes(config)):
        run = new_run(config, slot.device)
        start(run)
        found = list(range_test(run, lowest, highest, steps))
    suggested = suggestion(found)
    directory.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Step._fields, *found])
    write_atomically(directory / "lr_finder.csv", text.getvalue().encode())
    plot_learning_rates(found, suggested, directory / "lr_finder.png")
    rates = f"{found[0].learning_rate:.3g} to {found[-1].learning_rate:.3g}"
    print(f"rates:       {rates}, {len(found)} of {steps} steps{_how(found, steps)}")
    print(f"suggestion:  optimizer.lr={suggested:.2g}")
    print("  a tenth of the rate at which the smoothed loss is lowest; where it still falls steeply would do as well.")
    print("  It is no more than that: a whole run with a schedule, pruning or a larger batch may want another.")
    print(f"picture:     {directory / 'lr_finder.png'}")
    print(f"table:       {directory / 'lr_finder.csv'}")


def _how(found: Sequence[Step], steps: int) -> str:
    risen = f", after which the loss was {DIVERGED:g} times its lowest, or no number"
    return "" if len(found) == steps else risen


def range_test(run: Run, lowest: float, highest: float, steps: int) -> Iterator[Step]:
    """Train a started run at rates that rise exponentially, until the loss has clearly risen.

    The rates are those of the optimizer's first group; others keep their ratio to it. The run is of no use afterwards.

    Raises:
        UserError: if that group has a rate of 0.
    """
    if run.base_lrs[0] == 0:
        none = "the learning rate of its first group is 0, and no factor makes another of it; any above 0 works"
        raise UserError(f"optimizer={run.config.optimizer.name}: {none}")
    rate = lowest

    def factor(epochs_done: float) -> float:
        return rate / run.base_lrs[0]

    run.schedule = factor
    done, average, least = 0, 0.0, math.inf
    endless = itertools.chain.from_iterable(_epochs(run))
    for done in range(1, steps + 1):
        interrupts.check()
        rate = lowest * (highest / lowest) ** ((done - 1) / (steps - 1))
        next(endless)
        loss = run.loss.item()
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed = average / (1 - SMOOTHING**done)
        if not math.isfinite(smoothed):
            return
        yield Step(run.optimizer.param_groups[0]["lr"], loss, smoothed)
        least = min(least, smoothed)
        if smoothed > DIVERGED * least:
            return


def _epochs(run: Run) -> Iterator[Iterator[int]]:
    """Passes over the training data without what follows an epoch."""
    while True:
        begin_epoch(run)
        yield training_steps(run)


def suggestion(found: Sequence[Step]) -> float:
    """A tenth of the rate with the lowest smoothed loss.

    Raises:
        UserError: if the loss was lowest at once, or had not risen by the end.
    """
    if len(found) < LEAST_STEPS:
        raise UserError(f"--from: the loss was no number after {len(found)} steps; a lower rate shows more")
    lowest = min(range(len(found)), key=lambda number: found[number].smoothed)
    if lowest == 0:
        shows = "a lower rate, or more --steps, shows more"
        raise UserError(f"--from {found[0].learning_rate:g}: the loss only rises; {shows}")
    if lowest == len(found) - 1:
        raise UserError(f"--to {found[-1].learning_rate:g}: the loss still falls there; a higher rate shows more")
    return SHARE * found[lowest].learning_rate
