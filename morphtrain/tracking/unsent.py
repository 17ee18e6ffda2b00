"""What a tracking store still lacks of a run, as a JSON file in the run's directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from morphtrain.addresses import shown
from morphtrain.errors import UserError
from morphtrain.files import write_atomically

FILE = "unsent.json"


@dataclass
class Record:
    """A run as its tracking store should have it, without the artifacts that it already has."""

    uri: str  # in the file without its password; whoever sends it says where to
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
    """Write `record` to `directory` atomically, readable by its owner only.

    Paths of files inside the directory are stored relative to it, so that it can be moved.
    """
    artifacts = [(_from(directory, path), folder) for path, folder in record.artifacts]
    facts = asdict(record) | {"uri": shown(record.uri), "artifacts": artifacts}
    write_atomically(directory / FILE, json.dumps(facts).encode(), mode=0o600)


def read(directory: Path) -> Record | None:
    """The record left in `directory`; None if everything of that run was sent.

    The directory may have come from somebody else: it names files of its own only.

    Raises:
        UserError: if there is no such directory, or its file is damaged, not MorphTrain's, or names other files.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory")
    path = directory / FILE
    if not path.exists():
        return None
    try:
        record = Record(**json.loads(path.read_text()))
        if not record.uri.isprintable():
            raise ValueError("its address is no text")
        record.artifacts = [(_inside(directory, file), folder) for file, folder in record.artifacts]
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or not written by MorphTrain ({error})") from error
    return record


def remove(directory: Path) -> None:
    """Remove the record after everything was sent."""
    (directory / FILE).unlink(missing_ok=True)


def _inside(directory: Path, file: str) -> str:
    """The path of a file that `directory` names, links resolved; it need not be there any more."""
    path = (directory / file).resolve()
    if not path.is_relative_to(directory.resolve()) or path.is_dir():
        raise UserError(f"{directory / FILE}: names {file!r}, which is no file inside {directory}; only those are sent")
    return str(path)


def _from(directory: Path, path: str) -> str:
    inside = Path(path).absolute()
    return str(inside.relative_to(directory.absolute())) if inside.is_relative_to(directory.absolute()) else str(inside)
