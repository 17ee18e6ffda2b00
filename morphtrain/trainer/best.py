"""The checkpoint of the best epoch so far, `best.pt`: another name of what was `last.pt` then, so it costs no writing.

The best epoch has the highest `val_accuracy`; of several, the network with the fewest MACs; then the earliest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from morphtrain.errors import UserError
from morphtrain.files import link_atomically
from morphtrain.state import Run
from morphtrain.trainer.checkpoint import LAST, Checkpoint

BEST = "best.pt"

Record = Mapping[str, float]

log = logging.getLogger(__name__)


def best(history: Sequence[Record]) -> Record:
    """The record of the best epoch."""
    return max(history, key=lambda record: (record["val_accuracy"], -record["macs"]))


def keep(run: Run, directory: Path) -> None:
    """Let best.pt be what last.pt holds, if the epoch that has just been saved is the best so far."""
    if best(run.history) is run.history[-1]:
        link_atomically(directory / LAST, directory / BEST)


def is_another(run: Run, directory: Path) -> bool:
    """Whether best.pt holds another epoch than last.pt."""
    return (directory / BEST).exists() and best(run.history) is not run.history[-1]


def carry_on(run: Run, source: Path, directory: Path) -> None:
    """Find the best.pt of a run that goes on from the checkpoint `source`: here, beside that, or that itself."""
    if not run.history:
        return
    for path in dict.fromkeys((directory / BEST, source.with_name(BEST), source)):
        if _holds_best(path, run.history):
            link_atomically(path, directory / BEST)
            return
    (directory / BEST).unlink(missing_ok=True)
    log.warning("%s: epoch %d was the best so far, and its checkpoint is gone", BEST, best(run.history)["epoch"])


def _holds_best(path: Path, history: Sequence[Record]) -> bool:
    """Whether a file is the checkpoint of the best epoch: its record has the time, so another run's is not equal."""
    if not path.exists():
        return False
    try:
        found = Checkpoint(path).facts["history"]
    except UserError as error:
        log.warning("%s", error)
        return False
    return bool(found) and found[-1] == best(history)
