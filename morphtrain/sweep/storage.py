"""Temporary."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from typing import Any


def open_storage(url: str) -> Any:
    import optuna

    return optuna.storages.RDBStorage(url)


@contextlib.contextmanager
def exclusive(url: str) -> Iterator[None]:
    with open(url.removeprefix("sqlite:///") + ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
