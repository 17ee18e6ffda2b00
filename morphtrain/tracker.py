"""The contract of a tracker. It stands apart from the others because it needs no torch, which is slow to import."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IN_EVERY_RECORD = "epoch_seconds"  # a metric that shows which epochs a store has


class Tracker(ABC):
    """Where the records of a run go while it trains.

    The checkpoint and `records.jsonl`, not the tracker, are the records that count. A tracker gets the whole history
    each time and sends what it has not sent yet, so a lost call costs nothing; it must never stop the training.
    Called in this order: `start`, then `update` after every epoch, `artifact` at any time, `finish` at the end.
    """

    run_id: str | None = None  # by which the tracker finds this run again; saved in the checkpoints

    @abstractmethod
    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Begin a run, or continue one if it was `resumed`.

        Args:
            params: the config, flattened to dotted keys.
            tags: the chosen options, seed, device, machine and code; `name` is what to call the run.
            history: the records of earlier epochs.
        """

    @abstractmethod
    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        """Take the records of all epochs so far; called outside everything that is clocked."""

    @abstractmethod
    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file, in `folder` of the run's files."""

    @abstractmethod
    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        """End the run as FINISHED, FAILED or KILLED."""

    def view(self) -> str:
        """The command or address that shows what has been recorded; "" if nothing has, or there is none."""
        return ""
