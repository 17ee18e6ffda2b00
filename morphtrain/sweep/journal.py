"""Optuna's journal file, made safe against killed workers: they leave neither a lock nor half a line."""

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
    """Open the storage in a journal file, which is created if it does not exist.

    Raises:
        ValueError: if the file is not a journal.
        OSError: if it cannot be opened.
    """
    if path.exists():
        with path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):  # cut_torn_line would mistake the file for half a line and empty it
                raise ValueError("not an Optuna journal")
    backend = JournalFileBackend(str(path), lock_obj=JournalLock(path))  # type: ignore[arg-type]
    try:
        return JournalStorage(backend)
    except (ValueError, KeyError) as error:
        raise ValueError("damaged, or not an Optuna journal") from error


class JournalLock:
    """The lock that the journal's backend takes for every write; it ends with the process that holds it.

    Optuna's own locks are files that exist or do not. The file of a killed worker stops all others for half a minute.
    Then each of them removes it, and the second removes the lock that the first has just taken.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.path = Path(f"{journal}.writing")
        self._held = ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock, remove a torn last line, and return True, as Optuna expects."""
        self._held.enter_context(file_lock(self.path))
        with self.journal.open("r+b") as file:
            cut_torn_line(file)
        return True

    def release(self) -> None:
        """Let the next writer in."""
        self._held.close()


def cut_torn_line(file: BinaryIO) -> None:
    """Remove an unfinished last line, left by a writer that died: the next line would be appended to it and lost."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read(1) in (b"", b"\n"):
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    log.warning("%s: a writer died in the middle of a line; the unfinished line is dropped", file.name)
