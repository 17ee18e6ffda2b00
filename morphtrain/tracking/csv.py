"""`metrics.csv` in the run directory: a row an epoch, with a header that names every column.

`records.jsonl` is there in any case and is what MorphTrain reads. This file is for spreadsheets and other programs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain import schema
from morphtrain.files import write_atomically
from morphtrain.tracker import Tracker
from morphtrain.tracking.tolerant import Tolerant

FILE = "metrics.csv"


class CsvTracker(Tracker):
    """Adds a row for each epoch; where one brings a new metric, the file is written again, with a column for it."""

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Make the file hold the epochs of `history`, whatever a killed run has left."""
        self.path = run_dir / FILE
        self.columns: list[str] = []
        self.written = 0  # rows
        if history:
            self._write(history)
        else:
            self.path.unlink(missing_ok=True)

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        """Add the epochs that the file lacks."""
        new = history[self.written :]
        known = all(key in self.columns for record in new for key in record)
        if new and known and self.path.exists():
            columns, self.columns = self.columns, []  # if this fails, all of it is written again
            with self.path.open("a") as file:
                file.write(_rows(new, columns))
            self.columns, self.written = columns, len(history)
        elif new:
            self._write(history)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Nothing: the file is in the run directory already."""

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        """Add what is left."""
        self.update(history)

    def _write(self, history: Sequence[Mapping[str, float]]) -> None:
        columns = list(dict.fromkeys(key for record in history for key in record))
        header = ",".join(columns) + "\n"  # names of metrics need no quotes
        write_atomically(self.path, (header + _rows(history, columns)).encode())
        self.columns, self.written = columns, len(history)


def _rows(records: Sequence[Mapping[str, float]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(records)
    return text.getvalue()


def build(config: schema.tracking.Tracking, run_id: str | None = None) -> Tolerant:
    """The tracker of the config group `tracking`."""
    return Tolerant("csv", CsvTracker())
