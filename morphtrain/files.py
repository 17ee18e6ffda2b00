"""A lock on a file that the kernel lets go of when its holder ends, on NFS and its kin as well."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock on `path`, which is made if need be and stays; waits for it. A thread can hold it only once.

    Raises:
        OSError: if the file cannot be opened, or its file system knows no locks.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile has the file open, too


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on an existing file; of two who ask at once, one may be told of the other."""
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
