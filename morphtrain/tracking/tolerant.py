"""A tracker that fails does not stop the training, and gets what it lacks when it works again."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain.addresses import shown
from morphtrain.errors import first_line
from morphtrain.tracker import Tracker
from morphtrain.tracking.pace import SHARE, Pace

log = logging.getLogger(__name__)


class Tolerant(Tracker):
    """Warns of the first failure of a tracker, and tries again so seldom that it hardly delays training.

    Args:
        name: of the option, for messages.
        tracker: its `start` may be called again until it succeeds; every call may raise whatever it likes.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.run_id = tracker.run_id
        self.pace = Pace(SHARE)
        self.started = False
        self.files: list[tuple[Path, str | None]] = []  # not kept yet

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """As the tracker's own; what fails is tried again with a later call."""
        self._start = functools.partial(self.tracker.start, params, tags, run_dir, resumed)
        self._attempt(lambda: self._sync(history))

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        """As the tracker's own."""
        self._attempt(lambda: self._sync(history))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """As the tracker's own; what it does not take is offered again with the next epoch."""
        self.files.append((path, folder))
        if self.started and not self.pace.failing:
            self._attempt(self._send_files)

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        """As the tracker's own; nobody who has stopped a run waits for one that fails."""
        lacks = not self.started or self.pace.failing or bool(self.files)
        whole = not lacks or self._attempt(lambda: self._sync(history), patient=status == "KILLED")
        if self.started:  # what it has opened has to be closed
            whole = self._attempt(lambda: self.tracker.finish(status, history), patient=False) and whole
        if not whole:
            log.warning("tracking=%s lacks part of this run; records.jsonl has all of it", self.name)

    def view(self) -> str:
        """As the tracker's own."""
        return self.tracker.view() if self.started else ""

    def _sync(self, history: Sequence[Mapping[str, float]]) -> None:
        if self.started:
            self.tracker.update(history)
        else:
            self._start(history)
            self.started = True
        self._send_files()

    def _send_files(self) -> None:
        while self.files:
            self.tracker.artifact(*self.files[0])
            self.files.pop(0)

    def _attempt(self, action: Callable[[], Any], patient: bool = True) -> bool:
        """Run `action` if it is due; False if it is not, or fails, which is said once an outage."""
        if patient and not self.pace.due:
            return False
        before = time.monotonic()
        try:
            action()
        except Exception as error:  # noqa: BLE001 (disks, servers and the user's own trackers fail in any way)
            if not self.pace.failing:
                reason = shown(first_line(error))
                log.warning("tracking=%s failed, training goes on without it: %s", self.name, reason)
            self.pace.failed(time.monotonic() - before)
            return False
        finally:
            self.run_id = self.tracker.run_id
        self.pace.succeeded()
        return True
