"""Which of the workers that share a study are alive.

Each worker holds a lock on its own file; the kernel releases it when the process ends, for whatever reason. Workers
that can see the file know at once. Those on other machines go by the heartbeats in the storage.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from morphtrain.errors import first_line
from morphtrain.files import is_locked, named_lock, remove_unlocked

log = logging.getLogger(__name__)

LOCK_ATTR, BEAT_ATTR = "worker_lock", "heartbeat"
LOCK_PREFIX = ".worker-"  # of a lock file's name
CONFIRM_PREFIX = ".confirm-worker-"  # of one for the runs at the end, which are a study of their own
SILENT_BEATS = 4  # a worker that has missed this many heartbeats is considered dead


class Worker:
    """This process as one of a study's workers: a context that holds its lock and sends heartbeats for its trials.

    Args:
        storage: the study's Optuna storage.
        directory: where the lock file goes; created if it does not exist.
        heartbeat_seconds: time between two heartbeats.
        prefix: of the lock file's name, one for each study that has such files here.
    """

    def __init__(self, storage: Any, directory: Path, heartbeat_seconds: float, prefix: str = LOCK_PREFIX) -> None:
        self.storage, self.prefix = storage, prefix
        self.path = directory.resolve() / f"{prefix}{os.uname().nodename}-{os.getpid()}.lock"
        self.heartbeat_seconds = heartbeat_seconds
        self.trial_ids: set[int] = set()
        self._lock = ExitStack()
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Worker:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(named_lock(self.path, str(os.getpid())))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._lock.close()

    def remove_dead(self) -> None:
        """Remove the lock files of the study's dead workers beside this one's. Queue their trials again first."""
        for path in self.path.parent.glob(f"{self.prefix}*.lock"):
            if path != self.path:
                remove_unlocked(path)

    def take(self, trial_id: int) -> None:
        """Record in the storage that the trial is this worker's."""
        self.storage.set_trial_user_attr(trial_id, LOCK_ATTR, str(self.path))
        self.storage.set_trial_user_attr(trial_id, BEAT_ATTR, time.time())
        with self._guard:
            self.trial_ids.add(trial_id)

    def drop(self, trial_id: int) -> None:
        """Stop the trial's heartbeats. Call this before the trial ends: a finished trial's attributes cannot be set."""
        with self._guard:
            self.trial_ids.discard(trial_id)

    def _beat(self) -> None:
        while not self._ended.wait(self.heartbeat_seconds):
            with self._guard:
                for trial_id in self.trial_ids:
                    self._say_alive(trial_id)

    def _say_alive(self, trial_id: int) -> None:
        try:
            self.storage.set_trial_user_attr(trial_id, BEAT_ATTR, time.time())
        except Exception as error:  # noqa: BLE001 (databases fail in too many ways to name; the next beat may work)
            log.warning("could not send a heartbeat to the study: %s", first_line(error))


def abandoned(attrs: dict[str, Any], heartbeat_seconds: float) -> bool:
    """Whether the worker that a running trial's attributes name is dead."""
    lock, beat = Path(str(attrs.get(LOCK_ATTR))), attrs.get(BEAT_ATTR)
    if (
        lock.name.startswith((LOCK_PREFIX, CONFIRM_PREFIX)) and lock.is_file()
    ):  # the study may name any file, and this opens it
        return not is_locked(lock)
    last = beat if isinstance(beat, (int, float)) else 0.0
    return time.time() - last > SILENT_BEATS * heartbeat_seconds
