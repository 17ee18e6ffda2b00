"""What a tracking store still lacks of a run, as a JSON file in the run's directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from morphtrain.errors import UserError
from morphtrain.files import write_atomically

FILE = "unsent.json"


@dataclass
class Record:
    """A run as its tracking store should have it, without the artifacts that it already has."""

    uri: str
    experiment: str
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    started: int  # milliseconds since 1970, as in MLflow; `ended` too
    ended: int | None = None
    status: str = "RUNNING"
    run_id: str | None = None  # None: the store is not known to have the run
    history: list[dict[str, float]] = field(default_factory=list)  # one record of metrics per epoch
    artifacts: list[tuple[str, str | None]] = field(default_factory=list)  # files, each with its folder in the store


def write(record: Record, directory: Path) -> None:
    """Write `record` to `directory` atomically, readable by its owner only: the URI may contain a password.

    Paths of files inside the directory are stored relative to it, so that it can be moved.
    """
    facts = asdict(record) | {"artifacts": [(_from(directory, path), folder) for path, folder in record.artifacts]}
    write_atomically(directory / FILE, json.dumps(facts).encode(), mode=0o600)


def read(directory: Path) -> Record | None:
    """The record left in `directory`; None if everything of that run was sent.

    Raises:
        UserError: if there is no such directory, or its file is damaged or not MorphTrain's.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory")
    path = directory / FILE
    if not path.exists():
        return None
    try:
        record = Record(**json.loads(path.read_text()))
        record.artifacts = [(str(directory / file), folder) for file, folder in record.artifacts]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged, or not written by MorphTrain ({error})") from error
    return record


def remove(directory: Path) -> None:
    """Remove the record after everything was sent."""
    (directory / FILE).unlink(missing_ok=True)


def _from(directory: Path, path: str) -> str:
    inside = Path(path).absolute()
    return str(inside.relative_to(directory.absolute())) if inside.is_relative_to(directory.absolute()) else str(inside)
