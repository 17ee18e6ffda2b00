"""Optuna's journal file, with a lock that a killed worker does not leave behind, nor half a line."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from optuna.storages.journal import JournalFileBackend, JournalStorage

from morphtrain.files import file_lock

log = logging.getLogger(__name__)


def open_journal(path: Path) -> JournalStorage:
    """The storage in a journal file, which is made if there is none.

    Raises:
        ValueError: for a file that is no journal.
        OSError: if it cannot be opened.
    """
    if path.exists():
        with path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):  # a writer would take it for half a line, and cut it off
                raise ValueError("not a journal of Optuna's")
    backend = JournalFileBackend(str(path), lock_obj=JournalLock(path))  # type: ignore[arg-type]
    try:
        return JournalStorage(backend)
    except (ValueError, KeyError) as error:
        raise ValueError("damaged, or not a journal of Optuna's") from error


class JournalLock:
    """What the journal's backend takes for every write: a lock that ends with its holder.

    Optuna's own locks are files, there or not there. That of a killed worker stops all others for half a minute; then
    each of them breaks it, and the second to do so breaks the first one's.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.path = Path(f"{journal}.writing")
        self._held = ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(file_lock(self.path))
        with self.journal.open("r+b") as file:
            cut_torn_line(file)
        return True

    def release(self) -> None:
        self._held.close()


def cut_torn_line(file: BinaryIO) -> None:
    """Remove what a writer left that died in the middle of a line: the next line would be lost with it."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read(1) in (b"", b"\n"):
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    log.warning("%s: a writer died in the middle of a line, which is dropped", file.name)
