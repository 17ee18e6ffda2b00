"""Files that are written whole or not at all, and locks that the kernel takes back when their holder ends."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

LEFT_OVER = re.compile(r"\.\d+\.tmp(-\w+)?$")  # a process's own name for a file; SQLite adds -journal and the like


def write_atomically(
    path: Path, content: bytes | memoryview, *, mode: int = 0o666, previous: Path | None = None
) -> None:
    """Write a file under another name, and give it its own once it is on the disk: whole or not at all.

    Args:
        mode: its permissions, less what the umask takes away.
        previous: the name that the file there already gets; None: none. At every moment there is a whole file at
            `path`.

    Raises:
        OSError: naming `path`, for a disk that is full or read-only; then all files are as they were.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(fresh, "wb", opener=partial(os.open, mode=mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            link_atomically(path, previous)
        os.replace(fresh, path)
    except OSError as error:  # the system names no file when a write fails
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        fresh.unlink(missing_ok=True)


def remove_left_over(directory: Path, name: str = "") -> None:
    """Remove what killed processes have left half-written of the files `name`..., which nobody may be writing now."""
    for path in directory.iterdir():
        if path.name.startswith(name) and LEFT_OVER.search(path.name):
            path.unlink(missing_ok=True)


def link_atomically(source: Path, path: Path) -> None:
    """Give a file a second name, which may have stood for another one; a copy where the file system has no links.

    Raises:
        OSError: if neither can be made; `path` is as it was then.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fresh.unlink(missing_ok=True)
    try:
        os.link(source, fresh)
    except OSError:  # FAT, some network and container mounts; a full disk fails again below
        write_atomically(path, source.read_bytes())
        return
    try:
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)  # still there if both names stood for the same file


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock on a file; works on NFS and its kin as well. See `take_lock`."""
    with _given_back(take_lock(path)):
        yield


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Hold the lock on an existing directory, which leaves no file behind; not on NFS. Waits for it."""
    with _given_back(_locked(os.open(directory, os.O_RDONLY))):
        yield


def take_lock(path: Path) -> int:
    """Take the lock on `path`, until `give_back_lock` or the end of the process; waits for it.

    The file is made if need be, and stays. A thread can hold the lock only once.

    Returns:
        A descriptor for `give_back_lock`.

    Raises:
        OSError: if the file cannot be opened, or its file system knows no locks.
    """
    return _locked(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))


@contextmanager
def named_lock(path: Path, holder: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock on a file that says who holds it, and remove the file at the end.

    Raises:
        BlockingIOError: if another process holds it, unless it is to `wait`.
        OSError: as `take_lock`.
    """
    descriptor = _taken(path, wait)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        give_back_lock(descriptor)


def _taken(path: Path, wait: bool = False) -> int:
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        descriptor = _locked(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), operation)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
        give_back_lock(descriptor)  # of a file that its last holder has removed meanwhile


def remove_unlocked(path: Path) -> bool:
    """Remove the file of a `named_lock` whose holder was killed; False if somebody holds it."""
    try:
        descriptor = _taken(path)
    except BlockingIOError:
        return False
    path.unlink(missing_ok=True)
    give_back_lock(descriptor)
    return True


def give_back_lock(descriptor: int) -> None:
    """Give back a lock that `take_lock` took."""
    _held.discard(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: forked children hold the same lock
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on an existing file; of two who ask at once, one may be told of the other."""
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def _given_back(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        give_back_lock(descriptor)


def _locked(descriptor: int, operation: int = fcntl.LOCK_EX) -> int:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def _close_in_child() -> None:
    """A forked child, such as a loader's worker, must not hold the locks of a parent that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


_held: set[int] = set()  # descriptors of the locks of this process
os.register_at_fork(after_in_child=_close_in_child)
