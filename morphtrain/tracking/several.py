"""Several trackers of one run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain.plain_data import mismatch
from morphtrain.tracker import Tracker

IDS = "several: "  # how the `run_id` of several begins, before JSON with that of each


class Several(Tracker):
    """Tells each of several trackers what one would be told.

    None of them may raise: a failure of one must not keep the others from what they are told (see `Tolerant`).

    Args:
        trackers: by the names of their options.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.trackers = trackers
        self._note_ids()

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        for tracker in self.trackers.values():
            tracker.start(params, tags, run_dir, resumed, history)
        self._note_ids()

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        for tracker in self.trackers.values():
            tracker.update(history)
        self._note_ids()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        for tracker in self.trackers.values():
            tracker.artifact(path, folder)

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        for tracker in self.trackers.values():
            tracker.finish(status, history)

    def view(self) -> str:
        return ", ".join(filter(None, (tracker.view() for tracker in self.trackers.values())))

    def _note_ids(self) -> None:
        ids = {name: tracker.run_id for name, tracker in self.trackers.items() if tracker.run_id is not None}
        self.run_id = f"{IDS}{json.dumps(ids)}" if ids else None


def run_ids(stored: str | None, main: str) -> dict[str, str]:
    """The ids by which trackers find their runs again, by the names of their options.

    Args:
        stored: the `run_id` that a checkpoint has: of one tracker, or of several.
        main: the option `tracking`, whose id it is where it is of one.
    """
    if stored is None:
        return {}
    if not stored.startswith(IDS):
        return {main: stored}
    try:
        ids: dict[str, str] = json.loads(stored.removeprefix(IDS))
    except (ValueError, RecursionError):
        return {}
    return {} if mismatch(ids, dict[str, str], "ids") else ids
