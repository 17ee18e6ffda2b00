"""The records that runs leave in their directories."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "records.jsonl"


def read_records(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of every epoch of a run, by their names in MLflow, in the order of epochs.

    Raises:
        OSError: for a directory without records.
    """
    return [json.loads(line) for line in (run_dir / FILE).read_text().splitlines()]
