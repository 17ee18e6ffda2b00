"""torchvision's data sets, with one error message for the many ways in which a download can fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.files import named_lock

LOCK = ".download.lock"


def load(dataset: str, config: schema.data.Downloaded, train: bool, hint: str = "") -> Any:
    """torchvision's data set `dataset` in `config.root`, downloaded if it is missing and `config.download` is true.

    Whoever else wants to download something to this place meanwhile waits, and finds what is there then.

    Args:
        dataset: name of the class in `torchvision.datasets`.
        config: `root` and `download`.
        train: the training set; False for the test set.
        hint: another way to get the files, for the error message.

    Raises:
        UserError: if it is not in `config.root` and cannot be downloaded.
    """
    from torchvision import datasets

    kind = getattr(datasets, dataset)
    try:
        return kind(config.root, train=train, download=False)
    except RuntimeError as missing:
        if not config.download:
            raise UserError(_message(dataset, config, "data.download=false", hint)) from missing
    try:
        with _no_empty_directories(Path(config.root)), _alone(Path(config.root)):
            return kind(config.root, train=train, download=True)
    except (OSError, RuntimeError) as error:  # no network: URLError; broken archive: RuntimeError
        raise UserError(_message(dataset, config, f"the download failed ({error})", hint)) from error


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep other processes, of this run and of others, from downloading to `root` during the block."""
    root.mkdir(parents=True, exist_ok=True)
    with named_lock(root / LOCK, f"process {os.getpid()}", wait=True):
        yield


@contextmanager
def _no_empty_directories(root: Path) -> Iterator[None]:
    """Remove the empty directories that torchvision has made in and above `root` before a download failed."""
    before = {root, *root.parents} | {Path(place) for place, _, _ in os.walk(root)}
    before = {place for place in before if place.exists()}
    try:
        yield
    except BaseException:
        after = [root, *root.parents, *(Path(place) for place, _, _ in os.walk(root))]
        for place in sorted(set(after) - before, key=lambda place: len(place.parts), reverse=True):
            with suppress(OSError):  # not empty
                place.rmdir()
        raise


def _message(dataset: str, config: schema.data.Downloaded, why: str, hint: str) -> str:
    text = f"data.root={config.root}: there is no {dataset}, and {why}; copy the files there"
    return f"{text}, {hint}" if hint else text
