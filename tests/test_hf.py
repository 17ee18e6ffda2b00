"""`data=hf`: tables and folders are read as folders of images are, by nobody's leave and without the network."""

from __future__ import annotations

import io
import json
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_image_folder import config as folder_config
from test_image_folder import epoch, held_out, noise, write

import morphtrain
from morphtrain import schema
from morphtrain.data import hf, image_folder
from morphtrain.data.image_bytes import ByteData
from morphtrain.data.images import drawn
from morphtrain.errors import UserError
from morphtrain.schema.data_hf import HuggingFace
from morphtrain.trainer import train

datasets = pytest.importorskip("datasets")

SIZES = [(24, 30), (31, 24), (20, 20), (26, 33), (30, 25), (22, 21), (28, 28), (25, 40)]
CLASSES = ["class_0", "class_1"]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A cache of the test's own, and no network: whoever asks for an address is noted."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield asked


def config(root: Path | str, **changes: Any) -> HuggingFace:
    """The option file's keys, set for small images that this process reads itself."""
    keys: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / "data" / "hf.yaml"))
    small = {"root": str(root), "image_size": 16, "resize": 20, "in_memory": False, "num_workers": 0}
    return HuggingFace(**{**keys, **small, **changes})


def encoded(image: np.ndarray) -> dict[str, Any]:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def table(images: Sequence[dict[str, Any]], labels: Sequence[Any], label: Any = None) -> Any:
    """Columns image and label; of classes without a type."""
    features = datasets.Features({"image": datasets.Image(), "label": label or datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features)


def parquet(root: Path, **splits: Any) -> Path:
    """Splits as the hub has them."""
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("# pictures")
    for split, rows in splits.items():
        rows.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def same(found: Any, expected: Any) -> None:
    """The same images in the same order, trained on in the same crops."""
    assert [len(part) for part in (found.train, found.val)] == [len(part) for part in (expected.train, expected.val)]
    assert torch.equal(held_out(found), held_out(expected))
    for a, b in zip(epoch(found, 3, 7), epoch(expected, 3, 7), strict=True):
        assert torch.equal(a, b)
    assert found.preprocessing == expected.preprocessing


@pytest.mark.parametrize("in_memory", [False, True], ids=["files", "memory"])
def test_parquet_files_are_read_as_folders_of_the_same_images(in_memory: bool, tmp_path: Path, alone: list) -> None:
    images = noise(SIZES)
    folder = write(tmp_path / "folder", images)
    by_class = [*range(0, 8, 2), *range(1, 8, 2)]  # in the order of the folders
    rows = table([encoded(images[number]) for number in by_class], [number % 2 for number in by_class])
    root = parquet(tmp_path / "set", train=rows, validation=rows)
    found = hf.build(config(root, in_memory=in_memory))
    assert isinstance(found, ByteData) == in_memory
    same(found, image_folder.build(folder_config(folder, in_memory=in_memory)))
    assert not found.test
    helped = hf.build(config(root, num_workers=2, transforms=["RandAugment"]))
    again = hf.build(config(root, transforms=["RandAugment"]))
    assert torch.equal(epoch(helped, 3, 1)[0], epoch(again, 5, 1)[0])
    assert alone == []


@pytest.mark.parametrize("typed", ["relative", "link", "absolute"])
def test_a_folder_of_images_is_read_as_image_folder_reads_it(
    typed: str, tmp_path: Path, alone: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "folder", noise(SIZES), suffix="jpg")
    shutil.copytree(folder / "val", folder / "test")
    (tmp_path / "link").symlink_to(folder)
    root = {"relative": "folder", "link": "link", "absolute": str(folder)}[typed]
    found, expected = hf.find_rows(config(root)), image_folder.find_images(root)
    assert (found.train, found.val, found.test) == (expected.train, expected.val, expected.test)
    assert found.classes == expected.classes and found.digest() == expected.digest()
    same(hf.build(config(root)), image_folder.build(folder_config(Path(root))))
    assert alone == []


def test_a_share_of_the_training_images_validates_where_no_split_does(tmp_path: Path) -> None:
    images = [np.full((20, 20, 3), 10 * number, dtype=np.uint8) for number in range(20)]
    rows = table([encoded(image) for image in images], [number % 2 for number in range(20)])
    rows.to_parquet(tmp_path / "pictures.parquet")
    data = hf.build(config(tmp_path / "pictures.parquet", val_share=0.25))
    validates = drawn(20, 0.25)
    assert [source.number for source, _ in data.val] == validates.nonzero().flatten().tolist()
    assert [source.number for source, _ in data.train] == (~validates).nonzero().flatten().tolist()
    assert all(label == source.number % 2 for source, label in (*data.train, *data.val))
    with pytest.raises(
        UserError, match=r"data\.val_share=0: .* has no split that validates or tests, only train; above"
    ):
        hf.build(config(tmp_path / "pictures.parquet", val_share=0))


def counts(root: Path, **changes: Any) -> tuple[int, int, int]:
    found = hf.find_rows(config(root, **changes))
    return len(found.train), len(found.val), len(found.test)


def test_splits_are_those_that_are_named_or_that_their_names_say(tmp_path: Path) -> None:
    image = encoded(noise([(20, 20)])[0])
    sizes = {"train": 10, "test": 4, "unsupervised": 3}
    splits = {name: table([image] * size, [row % 2 for row in range(size)]) for name, size in sizes.items()}
    root = parquet(tmp_path / "set", **splits)
    assert counts(root) == (9, 1, 4)
    assert counts(root, val_share=0) == (10, 4, 0)
    assert counts(root, test_split=None, val_share=0.3) == (7, 3, 0)
    assert counts(root, val_split="test") == (10, 4, 0)
    assert counts(root, train_split="unsupervised", val_split="train", test_split="test") == (3, 10, 4)
    for changes, message in (
        ({"train_split": "trian"}, r"data\.train_split=trian: .* has no such split; did you mean train"),
        ({"val_split": "validation"}, r"data\.val_split=validation: .* no such split; there are train, "),
        ({"val_split": "train"}, r"data\.val_split=train: must be another split than data\.train_split"),
        (
            {"val_split": "test", "test_split": "test"},
            r"data\.test_split=test: must be another split than data\.val_spl",
        ),
        ({"subset": "small"}, r"data\.subset=small: .* is no set of the hub; data\.subset=null works"),
    ):
        with pytest.raises(UserError, match=message):
            hf.find_rows(config(root, **changes))


@pytest.mark.parametrize(
    ("kind", "values", "classes"),
    [
        ("int64", [7, -3, 7, 40, -3, 40], ["-3", "7", "40"]),
        ("string", ["cat", "ant", "bee", "ant", "cat", "bee"], ["ant", "bee", "cat"]),
        ("bool", [True, False, True, True, False, True], ["False", "True"]),
    ],
)
def test_values_without_names_are_classes_in_their_order(
    kind: str, values: list[Any], classes: list[str], tmp_path: Path
) -> None:
    rows = table([encoded(image) for image in noise([(20, 20)] * 6)], values, datasets.Value(kind))
    found = hf.find_rows(config(parquet(tmp_path / "set", train=rows, validation=rows)))
    assert found.classes == classes
    assert [found.classes[label] for _, label in found.train] == [str(value) for value in values]


def test_columns_are_found_by_their_type_or_named(tmp_path: Path) -> None:
    images = [encoded(image) for image in noise([(20, 20)] * 4)]
    names = datasets.ClassLabel(names=CLASSES)
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "mask": datasets.Image(),
            "coarse": names,
            "fine": names,
            "note": datasets.Value("string"),
        }
    )
    columns = {
        "photo": images,
        "mask": images[::-1],
        "coarse": [0, 1, 0, 1],
        "fine": [1, 0, 0, 1],
        "note": list("abcd"),
    }
    rows = datasets.Dataset.from_dict(columns, features=features)
    root = parquet(tmp_path / "set", train=rows, validation=rows)
    for changes, message in (
        (
            {},
            r"data\.image=null: of the columns of .*, photo, mask, coarse, fine, note, photo and mask may be meant",
        ),
        ({"image": "photo"}, r"data\.label=null: .* coarse and fine may be meant; name it"),
        ({"image": "foto", "label": "fine"}, r"data\.image=foto: .* has no such column; did you mean photo"),
    ):
        with pytest.raises(UserError, match=message):
            hf.find_rows(config(root, **changes))
    found = hf.find_rows(config(root, image="mask", label="fine"))
    assert [label for _, label in found.train] == [1, 0, 0, 1]
    source = found.train[0][0]
    assert not isinstance(source, str) and source.open().read() == images[-1]["bytes"]
    with pytest.raises(
        UserError, match=r"cannot read the image in row \d of split train \(the row holds no image file\)"
    ):
        epoch(hf.build(config(root, image="note", label="fine")), 2, 0)


def test_columns_that_no_library_has_typed_are_found_by_name(tmp_path: Path) -> None:
    """As others write Parquet: bytes, and numbers."""
    import pyarrow
    from pyarrow.parquet import write_table

    images = noise([(20, 20)] * 4)
    columns = {"image": [encoded(image)["bytes"] for image in images], "label": [0, 1, 0, 1]}
    write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    found = hf.build(config(tmp_path / "train.parquet"))
    assert found.num_classes == 2 and len(found.train) == 3


def test_images_without_a_class_are_named(tmp_path: Path) -> None:
    images = [encoded(image) for image in noise([(20, 20)] * 4)]
    rows, unlabelled = table(images, [0, 1, 0, 1]), table(images, [-1, -1, -1, -1])
    root = parquet(tmp_path / "set", train=rows, test=unlabelled)
    with pytest.raises(
        UserError, match=r"data\.test_split=test: row 0 of .* has the label -1, .*; data\.test_split=null"
    ):
        hf.build(config(root))
    assert counts(root, test_split=None) == (3, 1, 0)
    missing = parquet(tmp_path / "more", train=table(images, [0, None, 0, 1]))
    with pytest.raises(
        UserError, match=r"data\.train_split=train: row 1 of .* has the label None, none of the 2 classes"
    ):
        hf.build(config(missing))
    single = parquet(tmp_path / "single", train=table(images, ["a"] * 4, datasets.Value("string")))
    with pytest.raises(UserError, match=r"data\.label=label: 1 class in .*; two or more are needed"):
        hf.build(config(single))
    floats = parquet(tmp_path / "floats", train=table(images, [0.5] * 4, datasets.Value("float32")))
    with pytest.raises(
        UserError, match=r"data\.label=label: .* has values of type Value\('float32'\) there; a ClassLabel"
    ):
        hf.build(config(floats))


def test_files_that_number_the_classes_differently_are_refused(tmp_path: Path) -> None:
    """The library would take the numbers of one file for those of all: the network would validate on wrong labels."""
    images = [encoded(image) for image in noise([(20, 20)] * 4)]
    turned, more = (datasets.ClassLabel(names=names) for names in (CLASSES[::-1], [*CLASSES, "class_2"]))
    rows = table(images, [0, 1, 0, 1])
    root = parquet(tmp_path / "set", train=rows, validation=table(images, [0, 1, 0, 1], turned))
    said = r"class 0 of column label is class_0 in data/train-.* and class_1 in data/validation-.*; .* work"
    with pytest.raises(UserError, match=rf"data\.root=.*set: {said}"):
        hf.build(config(root))
    longer = parquet(tmp_path / "longer", train=rows, validation=table(images, [0, 1, 0, 1], more))
    with pytest.raises(UserError, match=r"class 2 of column label is none in .* and class_2 in "):
        hf.build(config(longer))
    same_names = parquet(tmp_path / "same", train=rows, validation=table(images, [1, 0, 0, 1]))
    assert counts(same_names) == (4, 4, 0)


@pytest.mark.parametrize("in_memory", [False, True], ids=["files", "memory"])
def test_an_unreadable_image_is_named_by_its_row_and_no_path_in_a_row_is_followed(
    in_memory: bool, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    Image.fromarray(noise([(20, 20)])[0]).save(secret)
    images = [encoded(image) for image in noise([(20, 20)] * 4)]
    for name, odd in {
        "broken": {"bytes": b"<html>404</html>", "path": None},
        "path": {"bytes": None, "path": str(secret)},
    }.items():
        rows = table([*images[:2], odd, *images[3:]], [0, 1, 0, 1])
        root = parquet(tmp_path / name, train=rows, validation=table(images, [0, 1, 0, 1]))
        with pytest.raises(UserError) as caught:
            epoch(hf.build(config(root, in_memory=in_memory)), 4, 0)
        assert str(caught.value).startswith(f"data.root={root}: cannot read the image in row 2 of split train (")
        assert "\n" not in str(caught.value)


def test_what_is_no_set_is_named_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("nothing")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    write(tmp_path / "one", noise([(20, 20)] * 2), classes=1)
    for name in ("empty", "notes", "broken.parquet", "one"):
        with pytest.raises(UserError) as refused:
            hf.build(config(tmp_path / name))
        assert "\n" not in str(refused.value)
        assert str(tmp_path / name) in str(refused.value)


def test_a_set_that_is_neither_here_nor_within_reach_is_named_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"^data\.root=nobody/pictures: .*; no file or folder is there, and a set of the"
    ) as refused:
        hf.build(config("nobody/pictures"))
    assert "\n" not in str(refused.value)


def test_a_set_of_the_hub_is_read_offline_once_it_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` leaves it."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    images = noise([(20, 20)] * 6)
    rows = table([encoded(image) for image in images], [0, 1] * 3)
    local = parquet(tmp_path / "set", train=rows, validation=rows)
    expected = hf.build(config(local))
    (made,) = (path.parent for path in (tmp_path / "cache").rglob("dataset_info.json"))
    place = tmp_path / "cache" / "nobody___pictures" / "default" / "0.0.0" / ("a" * 40)
    place.mkdir(parents=True)
    for file in made.glob("*.arrow"):
        shutil.copy(file, place / file.name.replace("parquet-", "pictures-"))
    facts = json.loads((made / "dataset_info.json").read_text())
    facts |= {"config_name": "default", "dataset_name": "pictures"}
    (place / "dataset_info.json").write_text(json.dumps(facts).replace('"parquet"}', '"pictures"}'))
    same(hf.build(config("nobody/pictures")), expected)
    assert counts("nobody/pictures", revision="a" * 40) == (6, 6, 0)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"data\.revision=main: the hub cannot be reached, and what was fetched before is a"
    ):
        hf.build(config("nobody/pictures", revision="main"))


def test_nothing_that_lies_in_a_folder_is_executed(tmp_path: Path, alone: list) -> None:
    rows = table([encoded(image) for image in noise([(20, 20)] * 4)], [0, 1, 0, 1])
    root = parquet(tmp_path / "pictures", train=rows, validation=rows)
    (root / "pictures.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: https://localhost/x.parquet\n---\n"
    )
    assert len(hf.build(config(root)).train) == 4
    assert not (tmp_path / "executed").exists() and alone == []


def test_the_library_tells_nobody() -> None:
    import huggingface_hub

    hf.library()
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
    assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_a_missing_package_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"^data=hf: needs the package datasets; pip install 'morphtrain\[hf\]'$"):
        hf.build(config(tmp_path))


def test_a_run_on_a_table_says_the_classes(tmp_path: Path) -> None:
    colours = [np.full((24, 30, 3), 250 * (number % 2), dtype=np.uint8) for number in range(40)]
    rows = table([encoded(image) for image in colours], [number % 2 for number in range(40)])
    root = parquet(tmp_path / "set", train=rows, test=rows)
    keys = ("data=hf", f"data.root={root}", "data.image_size=8", "data.num_workers=0", "data.in_memory=false")
    run = ("model.width=4", "batch_policy.batch_size=8", "epochs=2", "tracking=none", "device=cpu")
    train(morphtrain.compose(*keys, *run, "objective=[val_accuracy]"), tmp_path, {})
    assert morphtrain.load_preprocessing(tmp_path / "last.pt").classes == tuple(CLASSES)
