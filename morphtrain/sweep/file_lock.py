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
