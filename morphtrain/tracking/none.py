"""No tracking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain import schema
from morphtrain.tracker import Tracker


class NoTracker(Tracker):
    """A tracker that keeps nothing."""

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        pass

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        pass

    def artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        pass


def build(config: schema.tracking.Tracking, run_id: str | None = None) -> NoTracker:
    """The tracker of the config group `tracking`."""
    return NoTracker()
