"""What Hugging Face's `datasets` reads: Parquet files, folders of images, sets of the hub; as tables, a split each."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from morphtrain.errors import UserError, said
from morphtrain.schema.data_hf import HuggingFace

KINDS = ("parquet", "arrow", "imagefolder")  # of sets on the hub, those that hold images as they are
METADATA = "metadata.parquet"  # of a folder of images: a table of what is known of them

Table = Any  # a `datasets.Dataset`


def library() -> ModuleType:
    """The package `datasets`, which tells nobody what it is used for."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise UserError("data=hf: needs the package datasets; pip install 'morphtrain[hf]'") from error
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise a request is sent for local files, too
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    return datasets


def loaded(config: HuggingFace) -> Mapping[str, Table]:
    """The tables of all splits."""
    datasets, place = library(), Path(config.root).expanduser()
    if not place.exists():
        wanted = "no file or folder is there, and a set of the hub has to be reached, or to have been fetched before"
        return _tried(config, datasets, lambda: _of_hub(config, datasets), wanted)
    for key in ("subset", "revision"):
        if (value := getattr(config, key)) is not None:
            raise UserError(f"data.{key}={value}: data.root={config.root} is no set of the hub; data.{key}=null works")
    wanted = "a Parquet file, a folder that holds some, or a folder with a folder of images for each class works"
    return _tried(config, datasets, lambda: _local(config, datasets, place.absolute()), wanted)


def _tried(
    config: HuggingFace, datasets: ModuleType, load: Callable[[], Mapping[str, Table]], wanted: str
) -> Mapping[str, Table]:
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # of the library and of all that it reads with
        hides = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None
        cause = error.__cause__ if hides else error
        raise UserError(f"data.root={config.root}: {said(cause or error)}; {wanted}") from error


def _local(config: HuggingFace, datasets: ModuleType, place: Path) -> Mapping[str, Table]:
    """The Parquet files at a place, or its images; nothing else that lies there is read."""
    datasets.disable_progress_bars()
    found: Mapping[str, Table]
    if place.is_file():
        found = datasets.load_dataset("parquet", data_files={"train": str(place)})
    elif any(path.name != METADATA for path in place.rglob("*.parquet")):
        patterns = datasets.data_files.get_data_patterns(str(place))
        files = datasets.data_files.DataFilesDict.from_patterns(patterns, str(place), allowed_extensions=[".parquet"])
        by_split = {split: list(paths) for split, paths in files.items() if paths}
        _check_numbers(config, datasets, [path for paths in by_split.values() for path in paths])
        found = datasets.load_dataset("parquet", data_files=by_split)
    else:
        found = datasets.load_dataset("imagefolder", data_dir=str(place))
    return found


def _check_numbers(config: HuggingFace, datasets: ModuleType, paths: Sequence[str]) -> None:
    """Raise a `UserError` if files number the classes differently: the library takes those of one file for all."""
    from pyarrow import parquet

    first: dict[str, tuple[str, Sequence[str]]] = {}  # by column: a file, and the names of its classes
    for path in paths:
        for column, feature in datasets.Features.from_arrow_schema(parquet.read_schema(path)).items():
            if not isinstance(feature, datasets.ClassLabel) or config.label not in (None, column):
                continue
            other, names = first.setdefault(column, (path, feature.names))
            pairs = itertools.zip_longest(names, feature.names, fillvalue="none")
            for number, (there, here) in enumerate(pairs):
                if there != here:
                    places = f"{there} in {_below(config, other)} and {here} in {_below(config, path)}"
                    raise UserError(
                        f"data.root={config.root}: class {number} of column {column} is {places}; files with the same "
                        "classes in the same order, or with text in place of numbers, work"
                    )


def _below(config: HuggingFace, path: str) -> str:
    """A file's path from `data.root`."""
    return os.path.relpath(path, Path(config.root).expanduser().resolve())


def _of_hub(config: HuggingFace, datasets: ModuleType) -> Mapping[str, Table]:
    builder = datasets.load_dataset_builder(config.root, config.subset, revision=config.revision)
    kind = builder.info.builder_name
    if kind not in KINDS:
        raise UserError(f"data.root={config.root}: is a set of kind {kind}; {', '.join(KINDS)} work")
    if builder.name == "cache" and config.revision not in (None, builder.hash):  # which is the newest that there is
        raise UserError(
            f"data.revision={config.revision}: the hub cannot be reached, and what was fetched before is "
            f"{builder.hash}; data.revision=null takes that"
        )
    builder.download_and_prepare()
    found: Mapping[str, Table] = builder.as_dataset()
    return found
