"""Folders of images in ImageNet's layout: in memory if they fit, otherwise read by workers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from morphtrain import schema
from morphtrain.data.crops import Crops
from morphtrain.data.image_bytes import ByteData, decode
from morphtrain.data.image_files import FileData, ImageFiles
from morphtrain.errors import UserError
from morphtrain.memory_limit import machine_bytes

log = logging.getLogger(__name__)

GIB = 2**30
MOST_WORKERS = 16  # enough to feed one device; each keeps two batches ready
LAYOUT = "data.root must hold train/<class>/ and val/<class>/ with images in each"


def build(config: schema.data.ImageFolder) -> ByteData | FileData:
    """The images in `data.root`, in memory or read by workers.

    Raises:
        UserError: if the folders do not have ImageNet's layout or, in memory, if an image cannot be read.
    """
    files = find_images(config.root)
    resize = round(config.image_size * 8 / 7) if config.resize == "auto" else config.resize
    crops = Crops(config.image_size, resize, config.min_scale, config.flip)
    workers = worker_count(config.num_workers)
    size = len(files) * 3 * resize**2 / GIB
    in_memory = size <= memory_limit(config.memory_limit) if config.in_memory == "auto" else config.in_memory
    readers = f"{workers} worker{'s' if workers > 1 else ''}" if workers else "the process that trains"
    log.info("%d images, %.2g GiB decoded: %s", len(files), size, "in memory" if in_memory else f"read by {readers}")
    return decode(files, crops, workers) if in_memory else FileData(files, crops, workers)


def find_images(root: str) -> ImageFiles:
    """The files below train/<class>/ and val/<class>/ in `root`; classes are numbered in the order of their names.

    Raises:
        UserError: if `root` has another layout, a class without images, or fewer than two classes.
    """
    folders = [Path(root).expanduser() / part for part in ("train", "val")]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"data.root={root}: there is no directory {folder}; {LAYOUT}")
    try:
        classes = [find_classes(folder)[0] for folder in folders]
        _check_classes(root, *classes)
        train, val = (ImageFolder(folder).samples for folder in folders)
    except OSError as error:  # no class, a class without images, or an unreadable folder
        raise UserError(f"data.root={root}: {error}; {LAYOUT}") from error
    return ImageFiles(root, classes[0], train, val)


def _check_classes(root: str, train: list[str], val: list[str]) -> None:
    differences = []
    for here, there, name in ((train, val, "train"), (val, train, "val")):
        only = sorted(set(here) - set(there))
        if only:
            differences.append(f"{', '.join(only[:3])}{', ...' if len(only) > 3 else ''} only in {name}")
    if differences:
        raise UserError(f"data.root={root}: the classes of train and val differ ({'; '.join(differences)}); {LAYOUT}")
    if len(train) < 2:
        raise UserError(f"data.root={root}: only one class, {train[0]}; two or more are needed; {LAYOUT}")


def worker_count(wanted: str | int) -> int:
    """The number of workers; "auto": one for each core this process may use except its own, at most `MOST_WORKERS`."""
    if wanted != "auto":
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores - 1)


def memory_limit(wanted: str | float) -> float:
    """GiB that a decoded set may take; "auto": a quarter of the memory of the machine, or of its container."""
    return machine_bytes() / 4 / GIB if wanted == "auto" else float(wanted)
