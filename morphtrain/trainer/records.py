"""`records.jsonl` in the run directory: one line per epoch, the same names as in MLflow, whatever the tracker is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from morphtrain.evidence.records import FILE
from morphtrain.files import write_atomically


def begin(run_dir: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Make the file hold only the epochs of `history`: one that was killed before its checkpoint is trained again."""
    path = run_dir / FILE
    if history or path.exists():
        write_atomically(path, "".join(map(_line, history)).encode())


def append(run_dir: Path, record: Mapping[str, float]) -> None:
    """Add the record of an epoch whose checkpoint is on disk."""
    with (run_dir / FILE).open("a") as file:
        file.write(_line(record))


def _line(record: Mapping[str, float]) -> str:
    return json.dumps(record) + "\n"
