"""Images that Hugging Face's `datasets` reads: Parquet files, a folder, or a set of the hub; decoded as files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from morphtrain import world
from morphtrain.data.hf_tables import Table, library, loaded
from morphtrain.data.image_bytes import ByteData
from morphtrain.data.image_files import FileData, ImageFiles, Source
from morphtrain.data.image_folder import decoded
from morphtrain.data.images import drawn
from morphtrain.errors import UserError
from morphtrain.schema.data_hf import HuggingFace
from morphtrain.wording import nearest

VALIDATION = ("validation", "valid", "val", "dev")  # names of splits, in the order in which they are looked for
COLUMNS = {"image": ("image", "img"), "label": ("label", "labels")}  # by name, where no column has the type
NAMES = ("int", "uint", "bool", "string", "large_string")  # how the types begin whose values can be classes

Rows = Sequence[tuple[Source, int]]


class Row(NamedTuple):
    """An image file that is in a row of a table."""

    table: Table
    column: str
    split: str
    number: int

    def __str__(self) -> str:
        return f"in row {self.number} of split {self.split}"

    def open(self) -> BinaryIO:
        """See `Stored`. A path in a row is not followed: whoever wrote the table does not say what is read here."""
        value = self.table[self.number][self.column]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError("the row holds no image file")
        return BytesIO(content)


def build(config: HuggingFace) -> ByteData | FileData:
    """The images of the table, folder or set `data.root`, in memory or read by workers, as those of `image_folder`.

    Raises:
        UserError: if the package `datasets` is missing, if there is no such set, if it does not say which columns and
            splits are meant, or for what `image_folder.build` refuses.
    """
    return decoded(world.together(lambda: find_rows(config)), config)


def find_rows(config: HuggingFace) -> ImageFiles:
    """The images of `data.root` in the order of their rows, by the splits that `config` names.

    Without a split that validates, `data.val_share` of the training images do, the same for every seed.

    Raises:
        UserError: see `build`.
    """
    splits = loaded(config)
    names = _splits(config, splits)
    tables = {part: splits[name] for part, name in names.items()}
    image, label = (_column(config, key, tables["train"].features) for key in COLUMNS)
    classes, labels = _labels(config, tables, names, label)
    rows: dict[str, Rows] = {
        part: list(zip(_sources(config, table, names[part], image), labels[part], strict=True))
        for part, table in tables.items()
    }
    if "val" not in rows:
        rows["train"], rows["val"] = _divided(config, rows["train"])
    return ImageFiles(config.root, classes, rows["train"], rows["val"], rows.get("test", ()))


def _divided(config: HuggingFace, rows: Rows) -> tuple[Rows, Rows]:
    if len(rows) < 2:
        raise UserError(f"data.train_split={config.train_split}: one image; two or more, of which one validates, work")
    held_out = drawn(len(rows), config.val_share).tolist()
    train, val = ([row for row, out in zip(rows, held_out, strict=True) if out is part] for part in (False, True))
    return train, val


def _splits(config: HuggingFace, splits: Mapping[str, Table]) -> dict[str, str]:
    """The names of the splits to train on, and to validate and test on as far as there are such: train, val, test."""
    train, test = _named(config, "train_split", splits), config.test_split
    others = [name for name in splits if name != train]
    found = {"train": train}
    if config.val_split != "auto":
        found["val"] = _named(config, "val_split", splits)
    elif of_these := [name for name in VALIDATION if name in others and name != test]:
        found["val"] = of_these[0]
    if test not in ("auto", None):
        found["test"] = _named(config, "test_split", splits)
    elif test == "auto" and "test" in others and "test" not in found.values():
        found["test"] = "test"
    if "val" not in found and config.val_share == 0:
        if "test" not in found:
            raise UserError(
                f"data.val_share=0: data.root={config.root} has no split that validates or tests, only "
                f"{', '.join(splits)}; above 0, a share of the training images validates"
            )
        found["val"] = found.pop("test")
    for part, name in found.items():
        if not len(splits[name]):
            raise UserError(f"data.{part}_split={name}: data.root={config.root} has no image there; another works")
    return found


def _named(config: HuggingFace, key: str, splits: Mapping[str, Table]) -> str:
    name = str(getattr(config, key))
    if name not in splits:
        raise UserError(f"data.{key}={name}: data.root={config.root} has no such split; {nearest(name, splits)}")
    return name


def _column(config: HuggingFace, key: str, features: Mapping[str, Any]) -> str:
    """The column that `data.image` or `data.label` names; without a name the only one of its type."""
    datasets, named = library(), getattr(config, key)
    if named is not None:
        if named not in features:
            hint = nearest(named, features)
            raise UserError(f"data.{key}={named}: data.root={config.root} has no such column; {hint}")
        return str(named)
    kind = {"image": datasets.Image, "label": datasets.ClassLabel}[key]
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = found or [name for name in COLUMNS[key] if name in features]
    if len(found) == 1:
        return found[0]
    several = f"{' and '.join(found)} may be meant" if found else f"none is of type {kind.__name__}"
    raise UserError(
        f"data.{key}=null: of the columns of data.root={config.root}, {', '.join(features)}, {several}; name it"
    )


def _labels(
    config: HuggingFace, tables: Mapping[str, Table], names: Mapping[str, str], column: str
) -> tuple[list[str], dict[str, list[int]]]:
    """The names of the classes, and the numbers of those of all images, by part.

    Classes are those of the column's type, or else the values that the training images have, sorted.
    """
    values = {part: table.data.column(column).to_pylist() for part, table in tables.items()}
    classes, numbers = _classes(config, tables["train"].features[column], column, values["train"])
    if len(classes) < 2:
        raise UserError(f"data.label={column}: {len(classes)} class in data.root={config.root}; two or more are needed")
    for part, found in values.items():
        wrong = next((row for row, value in enumerate(found) if value not in numbers), None)
        if wrong is not None:
            instead = "; data.test_split=null works" if part == "test" else ""
            raise UserError(
                f"data.{part}_split={names[part]}: row {wrong} of data.root={config.root} has the label "
                f"{found[wrong]}, none of the {len(classes)} classes{instead}"
            )
    return classes, {part: [numbers[value] for value in found] for part, found in values.items()}


def _classes(
    config: HuggingFace, feature: Any, column: str, trained: Sequence[Any]
) -> tuple[list[str], dict[Any, int]]:
    """The names of the classes, and the number of each by the value of its images in the column."""
    datasets = library()
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), {number: number for number in range(feature.num_classes)}
    if not isinstance(feature, datasets.Value) or not feature.dtype.startswith(NAMES):
        raise UserError(
            f"data.label={column}: data.root={config.root} has values of type {feature} there; a ClassLabel, whole "
            "numbers or text work"
        )
    known = sorted({value for value in trained if value is not None})
    return [str(value) for value in known], {value: number for number, value in enumerate(known)}


def _sources(config: HuggingFace, table: Table, split: str, column: str) -> Sequence[Source]:
    """Where the images of a split are: in the rows of its table, or, of a folder, in files of their own."""
    datasets = library()
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))  # `image_files.rgb` decodes
    table = table.select_columns([column])
    paths = _paths(table, column) if table.info.builder_name == "imagefolder" else None
    if paths is None:
        return [Row(table, column, split, number) for number in range(len(table))]
    place = Path(config.root).expanduser()
    found, typed = str(place.resolve()), str(place)
    return [f"{typed}{path.removeprefix(found)}" if path.startswith(found) else path for path in paths]


def _paths(table: Table, column: str) -> list[str] | None:
    """The paths of image files that are not in the table; None if there is one that is."""
    from pyarrow.compute import struct_field

    stored = table.data.column(column)
    inside: int = len(stored) - struct_field(stored, "bytes").null_count
    paths: list[str] = struct_field(stored, "path").to_pylist()
    return None if inside else paths
