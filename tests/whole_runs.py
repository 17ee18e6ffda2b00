"""A run from its config to its last epoch, or an epoch of it, in this process."""

from __future__ import annotations

from morphtrain.schema import Config
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, build_run, finish_epoch, start, train_epoch


def trained_to_the_end(config: Config) -> Run:
    """A run after its last epoch; nothing is written."""
    run = build_run(config)
    start(run)
    while run.epoch < run.config.epochs:
        epoch(run)
    return run


def epoch(run: Run) -> dict[str, float]:
    """Train the next epoch of a started run; returns its record."""
    begin_epoch(run)
    train_epoch(run)
    return finish_epoch(run)
