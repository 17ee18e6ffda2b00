"""Folders of images in ImageNet's layout: in memory if they fit, otherwise read by workers."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from morphtrain import host, schema, world
from morphtrain.data.crops import Crops
from morphtrain.data.image_bytes import ByteData, decode
from morphtrain.data.image_files import FileData, ImageFiles
from morphtrain.data.transforms import build_transforms
from morphtrain.errors import UserError
from morphtrain.memory_limit import machine_bytes

log = logging.getLogger(__name__)

GIB = 2**30
MOST_WORKERS = 16  # enough to feed one device; each keeps two batches ready
LAYOUT = "data.root must hold train/<class>/ and val/<class>/ with images in each; test/<class>/ may be there, too"


def build(config: schema.data.ImageFolder) -> ByteData | FileData:
    """The images in `data.root`, in memory or read by workers.

    The processes of a run on one host divide its cores, and have the images in memory once.

    Raises:
        UserError: if the folders do not have ImageNet's layout, if hosts have different images or, in memory, if an
            image cannot be read.
    """
    return decoded(world.together(lambda: find_images(config.root)), config)


def decoded(files: ImageFiles, config: schema.data.Decoded) -> ByteData | FileData:
    """Listed images, in memory or read by workers; see `build`.

    With transforms, which act on single images, it is the workers that read them.
    """
    _check_same(files)
    transforms = build_transforms(config.transforms, config.image_size)
    resize = round(config.image_size * 8 / 7) if config.resize == "auto" else config.resize
    crops = Crops(config.image_size, resize, config.min_scale, config.flip, transforms)
    size = len(files) * 3 * resize**2
    limit = memory_share() if config.limit_bytes is None else config.limit_bytes
    least = -world.largest(-limit)  # of all hosts: in memory, crops are other ones
    in_memory = size <= least and transforms is None if config.in_memory == "auto" else config.in_memory
    workers = worker_count(config.num_workers, divided=not in_memory)
    log.info("%d images, %.2g GiB decoded: %s", len(files), size / GIB, "in memory" if in_memory else _readers(workers))
    if in_memory:
        return host.shared(lambda: decode(files, crops, workers))
    return FileData(files, crops, workers)


def _readers(workers: int) -> str:
    """Who decodes the images, for the log."""
    if not workers:
        return "read by the process that trains"
    each = f" in each of {world.size()} processes" if world.size() > 1 else ""
    return f"read by {workers} worker{'s' if workers > 1 else ''}{each}"


def _check_same(files: ImageFiles) -> None:
    """Raise a `UserError` unless all processes have found the same images, of which each reads a part."""
    if world.size() == 1:
        return
    found = world.gathered((socket.gethostname(), len(files), files.digest()))
    for name, number, digest in found:
        if digest != found[0][2]:
            raise UserError(
                f"data.root={files.root}: {name} has other images there ({number}) than {found[0][0]} ({found[0][1]}); "
                "every host needs the same files below the same names"
            )


def find_images(root: str) -> ImageFiles:
    """The files below train/<class>/, val/<class>/ and, if there, test/<class>/ in `root`.

    Classes are numbered in the order of their names.

    Raises:
        UserError: if `root` has another layout, a class without images, or fewer than two classes.
    """
    folders = {part: Path(root).expanduser() / part for part in ("train", "val", "test")}
    if not folders["test"].is_dir():
        del folders["test"]
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"data.root={root}: there is no directory {folder}; {LAYOUT}")
    try:
        classes = {part: _classes(root, folder) for part, folder in folders.items()}
        _check_classes(root, classes)
        samples = [_labelled(root, folder, classes["train"]) for folder in folders.values()]
    except OSError as error:  # an unreadable folder
        raise UserError(f"data.root={root}: {error}; {LAYOUT}") from error
    return ImageFiles(root, classes["train"], *samples)


def _classes(root: str, folder: Path) -> list[str]:
    """The names of its directories, sorted; hidden ones are not meant, as .ipynb_checkpoints."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"data.root={root}: {folder} holds no class; {LAYOUT}")
    return names


def _labelled(root: str, folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The paths of all images below the directories of `classes`, in torchvision's order, with the class's number."""
    found: list[tuple[str, int]] = []
    for number, name in enumerate(classes):
        paths = _images(root, folder / name)
        if not paths:
            raise UserError(f"data.root={root}: {folder / name} holds no image ({', '.join(IMG_EXTENSIONS)}); {LAYOUT}")
        found += [(path, number) for path in paths]
    return found


def _images(root: str, folder: Path) -> list[str]:
    """The image files below a class's directory; links are followed, but no directory is entered twice.

    Hidden files are not meant: on a Mac's disks, every 1.jpg has a ._1.jpg that is no image.
    """
    real = folder.resolve()
    entered = {str(real), *map(str, real.parents)}  # a link upwards would bring in the other classes
    places, found = [str(folder)], []
    while places:
        for entry in sorted(os.scandir(places.pop()), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if (real_path := os.path.realpath(entry.path)) not in entered:
                    entered.add(real_path)
                    places.append(entry.path)
            elif has_file_allowed_extension(entry.name, IMG_EXTENSIONS):
                if not entry.is_file():
                    why = "a pipe or a link to nothing"
                    raise UserError(
                        f"data.root={root}: cannot read the image {entry.path} ({why}); replace or remove it"
                    )
                found.append(entry.path)
    return sorted(found, key=os.path.split)


def _check_classes(root: str, classes: dict[str, list[str]]) -> None:
    train = classes["train"]
    for part, names in classes.items():
        differences = []
        for here, there, name in ((train, names, "train"), (names, train, part)):
            only = sorted(set(here) - set(there))
            if only:
                differences.append(f"{', '.join(only[:3])}{', ...' if len(only) > 3 else ''} only in {name}")
        if differences:
            found = "; ".join(differences)
            raise UserError(f"data.root={root}: the classes of train and {part} differ ({found}); {LAYOUT}")
    if len(train) < 2:
        raise UserError(f"data.root={root}: only one class, {train[0]}; two or more are needed; {LAYOUT}")


def worker_count(wanted: str | int, divided: bool = False) -> int:
    """The workers of this process; "auto": one for each core it may use except its own, at most `MOST_WORKERS`.

    With `divided`, cores and workers are those of a host, and the processes of a run divide them.
    """
    if wanted == "auto":
        cores = host.cores() if divided else len(host.allowed())
        return max(0, min(MOST_WORKERS, int(cores) - 1))
    return -(-int(wanted) // (world.local.size if divided else 1))  # rounded up: one that decodes alone holds up all


def memory_share() -> float:
    """Bytes that a decoded set may take by default: a quarter of the memory of the machine, or of its container."""
    return machine_bytes() / 4
