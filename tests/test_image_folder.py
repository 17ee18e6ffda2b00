"""Folders of images: the same bits whoever reads them, crops as torchvision's, mistakes named by their path."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Command, Kill
from PIL import Image
from ranks import in_ranks
from torch.nn import functional as F
from torchvision import transforms
from torchvision.datasets import ImageFolder

from morphtrain import host, memory_limit, schema, world
from morphtrain.data import Data, image_files, image_folder
from morphtrain.data.crops import DRAWS, MEAN, STD, mirrored, random_boxes, resized_crops
from morphtrain.data.image_bytes import ByteData
from morphtrain.data.image_files import FileData
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.wording import as_yaml

KINDS = pytest.mark.parametrize("in_memory", [False, True], ids=["files", "memory"])
ODD_SIZES = [(40, 30), (31, 53), (64, 64), (33, 40), (90, 35), (36, 37), (20, 20), (37, 36)]  # height, width


def config(root: Path, **changes: Any) -> schema.data.ImageFolder:
    defaults = dict(image_size=16, resize=20, min_scale=0.08, flip=True, memory_limit="auto", num_workers=0)
    return schema.data.ImageFolder(
        **{"name": "image_folder", "root": str(root), "in_memory": False, **defaults, **changes}
    )


def write(root: Path, images: list[np.ndarray], classes: int = 2, suffix: str = "png") -> Path:
    """Write the images (H, W, 3), dealt out to the classes of train, and again of val; the first belongs to class 0."""
    for part in ("train", "val"):
        for number, image in enumerate(images):
            path = root / part / f"class_{number % classes}" / f"{number:03d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def noise(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Back to 0 to 255."""
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def epoch(data: Data, batch_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(data.train_batches(batch_size, torch.Generator().manual_seed(seed)))
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def held_out(data: Data) -> torch.Tensor:
    return torch.cat([images for images, _ in data.val_batches()])


@KINDS
def test_an_epoch_is_every_image_once_whatever_the_batch_size(in_memory: bool, tmp_path: Path) -> None:
    """Images of one colour each: the colour says which one a crop is of, and has to stay."""
    greys = [np.full((40, 30, 3), 10 * i, dtype=np.uint8) for i in range(20)]
    data = image_folder.build(config(write(tmp_path, greys), in_memory=in_memory))
    assert (len(data.train), len(data.val), data.num_classes, data.input_shape) == (20, 20, 2, (3, 16, 16))
    state = torch.get_rng_state()
    images, labels = epoch(data, 8, seed=1)
    seen = (pixels(images) / 10).mean((1, 2, 3)).round()
    torch.testing.assert_close(pixels(images), (10 * seen).view(-1, 1, 1, 1).expand_as(images), atol=1e-3, rtol=0)
    assert sorted(seen.tolist()) == list(range(20)) != seen.tolist()
    assert torch.equal(labels, seen.long() % 2)
    for again, same in ((epoch(data, 5, seed=1), True), (epoch(data, 8, seed=2), False)):
        assert torch.equal(again[0], images) == same
    assert torch.equal(torch.get_rng_state(), state), "the run's other randomness must not depend on its loader"


@KINDS
def test_test_images_are_a_third_folder_if_there_is_one(in_memory: bool, tmp_path: Path) -> None:
    root = write(tmp_path, noise(ODD_SIZES))
    assert not image_folder.build(config(root, in_memory=in_memory)).test
    shutil.copytree(root / "val", root / "test")
    (root / "test" / "class_0" / "000.png").unlink()
    data = image_folder.build(config(root, in_memory=in_memory)).to(torch.device("cpu"))
    assert (len(data.train), len(data.val), len(data.test)) == (8, 8, 7)
    found = torch.cat([images for images, _ in data.test_batches()])
    assert torch.equal(found, held_out(data)[1:])
    shutil.rmtree(root / "test" / "class_1")
    with pytest.raises(UserError, match=r"the classes of train and test differ \(class_1 only in train\)"):
        image_folder.build(config(root))


@KINDS
def test_batch_size_and_epochs_change_crops_as_they_should(in_memory: bool, tmp_path: Path) -> None:
    data = image_folder.build(config(write(tmp_path, noise(ODD_SIZES)), in_memory=in_memory))
    first = epoch(data, 8, seed=1)[0]
    assert torch.equal(epoch(data, 3, seed=1)[0], first)
    other = epoch(data, 8, seed=2)[0]
    assert torch.cdist(first.flatten(1), other.flatten(1)).min() > 0, "no crop comes twice"


def test_workers_read_the_same_bits_and_live_on(tmp_path: Path) -> None:
    root = write(tmp_path, noise(ODD_SIZES * 3))
    alone, helped = (image_folder.build(config(root, num_workers=n)) for n in (0, 2))
    next(iter(helped.train_batches(4, torch.Generator())))  # a pass that is abandoned
    workers = {child.pid for child in multiprocessing.active_children()}
    assert len(workers) == 2
    for number, batch_size in enumerate((5, 5, 7)):
        for a, b in zip(epoch(alone, batch_size, number), epoch(helped, batch_size, number), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(held_out(alone), held_out(helped))
    assert {child.pid for child in multiprocessing.active_children()} == workers


@KINDS
def test_crops_are_boxes_of_random_place_size_shape_and_direction(in_memory: bool, tmp_path: Path) -> None:
    """Red says where a pixel was across, green where down: a crop's slopes are its box's size."""
    side = 64
    ramp = np.zeros((side, side, 3), dtype=np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = 4 * np.arange(side), 4 * np.arange(side)[:, None]
    data = image_folder.build(
        config(write(tmp_path, [ramp] * 150), in_memory=in_memory, image_size=32, resize=side, min_scale=0.25)
    )
    crops = pixels(epoch(data, 50, seed=3)[0]) / 4  # now in pixels of the ramp
    across, down = crops[:, 0].mean(1), crops[:, 1].mean(2)  # (N, 32)
    torch.testing.assert_close(crops[:, 0], across[:, None].expand(-1, 32, -1), atol=0.3, rtol=0)
    middle = slice(4, 28)  # away from the edges, where both ways of resizing are linear
    widths, heights = (32 / 23 * (line[:, middle][:, -1] - line[:, middle][:, 0]) for line in (across, down))
    assert 50 < (widths < 0).sum() < 100, "half of them mirrored"
    assert (heights > 0).all()
    widths = widths.abs()
    straight = across[:, 4, None] + torch.linspace(0, 1, 24) * (across[:, 27] - across[:, 4])[:, None]
    torch.testing.assert_close(across[:, middle], straight, atol=0.6, rtol=0)
    area, shape = widths * heights / side**2, widths / heights
    assert area.min() > 0.22
    assert area.max() < 1.02
    assert area.std() > 0.15
    assert 0.7 < shape.min() < 0.85
    assert 1.2 < shape.max() < 1.43
    for lines, lengths in ((across, widths), (down, heights)):
        starts = lines.mean(1) + 0.5 - lengths / 2
        assert starts.min() > -1
        assert (starts + lengths).max() < side + 1
        assert starts.std() > 5


@pytest.mark.parametrize(("height", "width"), [(60, 90), (64, 64), (20, 200), (200, 20), (1, 1)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    count = 3000
    ours = random_boxes(torch.rand(count, DRAWS, dtype=torch.float64), height, width, 0.08)
    image = torch.empty(3, height, width)
    scale, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all()
    for a, b in zip(ours.double().T, theirs.double().T, strict=True):
        error = ((a.var() + b.var()) / count).sqrt()
        assert abs(a.mean() - b.mean()) <= 4 * error
        assert abs(a.std() - b.std()) <= 4 * error


def test_batched_crops_are_interpolated_ones() -> None:
    images = torch.rand(40, 3, 24, 24)
    draws = torch.rand(40, DRAWS, dtype=torch.float64)
    boxes, flip = random_boxes(draws, 24, 24, 0.08), mirrored(draws)
    crops = resized_crops(images, boxes, flip, 20)
    for image, (top, left, height, width), turned, crop in zip(images, boxes.tolist(), flip, crops, strict=True):
        part = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(part, size=20, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(crop, expected.flip(2) if turned else expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("image_size", "resize"), [(16, 20), (15, 18), (16, 21), (17, 17)])
def test_evaluation_is_torchvisions_and_the_same_in_memory(image_size: int, resize: int, tmp_path: Path) -> None:
    root = write(tmp_path, noise(ODD_SIZES), suffix="jpg")
    sizes = dict(image_size=image_size, resize=resize)
    files, memory = (image_folder.build(config(root, in_memory=kept, **sizes)) for kept in (False, True))
    view = transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    paths = sorted((root / "val").rglob("*.jpg"))
    expected = torch.stack([view(Image.open(path)) for path in paths])
    torch.testing.assert_close(held_out(files), expected, atol=1e-5, rtol=0)
    assert torch.equal(held_out(files), held_out(memory))
    labels = torch.cat([labels for _, labels in memory.val_batches()])
    assert labels.tolist() == [0] * 4 + [1] * 4


def test_the_rule_that_keeps_data_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path, noise([(40, 50)] * 10))
    size = 20 * 3 * 20**2 / 2**30
    caplog.set_level(logging.INFO)
    for in_memory, limit, kept in (
        ("auto", size, True),
        ("auto", 0.99 * size, False),
        ("auto", "auto", True),
        (True, 0, True),
        (False, "auto", False),
    ):
        caplog.clear()
        data = image_folder.build(config(root, in_memory=in_memory, memory_limit=limit, num_workers=2))
        assert isinstance(data, ByteData if kept else FileData)
        (line,) = caplog.messages
        assert line == f"20 images, 2.2e-05 GiB decoded: {'in memory' if kept else 'read by 2 workers'}"
    (tmp_path / "memory.max").write_text("4096\n")
    monkeypatch.setattr(memory_limit, "CONTAINER_LIMIT", tmp_path / "memory.max")
    assert image_folder.memory_share() == 1024
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert [image_folder.worker_count(wanted) for wanted in ("auto", 0, 7)] == [3, 0, 7]


def remove(*paths: Path) -> None:
    for path in paths:
        for file in path.glob("*"):
            file.unlink()
        path.rmdir()


def broken(root: Path, case: str) -> list[str]:
    """Break the folders; returns what the message has to name."""
    train, val = root / "train", root / "val"
    if case == "no root":
        os.rename(root, root.with_name("elsewhere"))
        return ["no directory", str(train)]
    if case == "no val":
        remove(*val.iterdir(), val)
        return ["no directory", str(val), "val/<class>/"]
    if case == "no class":
        remove(*train.iterdir(), *val.iterdir())
        return ["holds no class", str(train)]
    if case == "one class":
        remove(train / "class_1", val / "class_1")
        return ["only one class, class_0"]
    if case == "other classes":
        (val / "class_1").rename(val / "klasse_1")
        return ["class_1 only in train", "klasse_1 only in val"]
    if case == "empty class":
        remove(val / "class_0")
        (val / "class_0").mkdir()
        return ["holds no image", "class_0", ".jpg"]
    raise AssertionError(case)


@pytest.mark.parametrize("case", ["no root", "no val", "no class", "one class", "other classes", "empty class"])
def test_another_layout_is_named(case: str, tmp_path: Path) -> None:
    root = write(tmp_path / "root", noise([(40, 50)] * 4))
    parts = broken(root, case)
    with pytest.raises(UserError) as caught:
        image_folder.build(config(root))
    for part in (f"data.root={root}: ", "train/<class>/", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def passes(root: Path, **changes: Any) -> Iterator[Data]:
    """Everything that reads every file once."""
    data = image_folder.build(config(root, **changes))
    epoch(data, 2, 0)
    held_out(data)
    yield data


@pytest.mark.parametrize("options", [dict(), dict(num_workers=2), dict(in_memory=True, num_workers=2)], ids=str)
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "chunk", "gone"])
def test_an_unreadable_image_is_named_by_its_path(options: dict, damage: str, tmp_path: Path) -> None:
    root = write(tmp_path, noise([(40, 50)] * 8))
    victim = root / "val" / "class_1" / "003.png"
    content = victim.read_bytes()
    damages = {
        "truncated": content[: len(content) // 2],
        "text": b"<html>404</html>",
        "empty": b"",
        "chunk": content[:40] + bytes(64) + content[104:],
    }
    if damage == "gone":
        victim.unlink()
        victim.symlink_to(tmp_path / "nowhere.png")
    else:
        victim.write_bytes(damages[damage])
    with pytest.raises(UserError) as caught:
        list(passes(root, **options))
    assert str(caught.value).startswith(f"data.root={root}: cannot read the image {victim} (")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patch has to reach the worker")
def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, noise([(40, 50)] * 4))
    monkeypatch.setattr(image_files, "rgb", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"data\.num_workers=1: a worker died .* try fewer workers, or 0") as caught:
        epoch(image_folder.build(config(root, num_workers=1)), 2, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "size"),
    [(1, 2**30), (0, 0), (0.5, 2**29), ("1GiB", 2**30), ("512 MiB", 2**29), ("8GB", 8e9), ("auto", None)],
)
def test_the_limit_takes_units(limit: object, size: float | None) -> None:
    assert config(Path("x"), memory_limit=limit).limit_bytes == size


def test_links_in_a_circle_bring_in_no_image_twice(tmp_path: Path) -> None:
    root = write(tmp_path / "images", noise([(20, 20)] * 4))
    elsewhere = write(tmp_path / "more", noise([(20, 20)] * 2))
    expected = {path: str(path).count("class_1") for path in root.rglob("*.png")}
    first = root / "train" / "class_0"
    (first / "itself").symlink_to(first)
    (first / "all").symlink_to(root)
    (first / "below").mkdir()
    (first / "below" / "up").symlink_to("..")
    (first / "further").symlink_to(elsewhere / "train" / "class_0")
    (first / "again").symlink_to(elsewhere / "train" / "class_0")
    files = image_folder.find_images(str(root))
    found = [(Path(path), label) for path, label in (*files.train, *files.val)]
    linked = [path for path, _ in found if path not in expected]
    assert [path.resolve() for path in linked] == list((elsewhere / "train" / "class_0").iterdir())
    assert {path: label for path, label in found if path in expected} == expected
    assert len(found) == len(expected) + 1


def test_files_are_listed_as_torchvision_lists_them(tmp_path: Path) -> None:
    root = write(tmp_path, noise([(8, 8)] * 6))
    for place in ("b/a", "b", "a.b", "a"):
        (root / "train" / "class_0" / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / "train" / "class_0" / place / "x.JPEG")
    files = image_folder.find_images(str(root))
    assert files.train == ImageFolder(root / "train").samples
    assert files.val == ImageFolder(root / "val").samples


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    root = write(tmp_path, noise([(8, 8)] * 4))
    before = image_folder.find_images(str(root))
    (root / "train" / "class_0" / "._000.png").write_bytes(b"\x00\x05\x16\x07")  # as macOS writes it
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "class_1" / ".thumbnails").mkdir()
    Image.new("RGB", (8, 8)).save(root / "train" / "class_1" / ".thumbnails" / "1.png")
    assert image_folder.find_images(str(root)) == before


def test_what_is_no_file_is_named_at_once(tmp_path: Path) -> None:
    root = write(tmp_path, noise([(8, 8)] * 4))
    for make in (os.mkfifo, lambda path: path.symlink_to("nowhere")):
        odd = root / "val" / "class_1" / "odd.jpg"
        make(odd)
        with pytest.raises(UserError, match=r"val/class_1/odd\.jpg \(a pipe or a link to nothing"):
            image_folder.find_images(str(root))
        odd.unlink()


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_grey_values_of_16_bits_keep_their_upper_8(suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (24, 24)).astype(np.uint16)
    path = tmp_path / f"x.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 24 24 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    read = np.asarray(image_files.rgb(str(path)))
    assert read.shape == (24, 24, 3)
    assert (read == (values >> 8)[:, :, None]).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_values_of_32_bits_are_refused(kind: type, tmp_path: Path) -> None:
    root = write(tmp_path, noise([(8, 8)] * 4))
    path = root / "train" / "class_0" / "deep.tiff"
    Image.fromarray(np.full((8, 8), 70000, kind)).save(path)
    with pytest.raises(UserError, match=r"data\.root=.*deep\.tiff.*32 bits a pixel"):
        image_folder.build(config(root, in_memory=True))


@pytest.mark.parametrize("value", [True, -1, 1.5, "many"])
def test_wrong_values_are_refused(value: object) -> None:
    for key in ("num_workers", "resize"):
        with pytest.raises(UserError, match=rf"data\.{key}={as_yaml(value)}: must be auto, or"):
            config(Path("x"), **{key: value})
    if value != 1.5:
        with pytest.raises(UserError, match=r"data\.memory_limit=.*: must be auto, a number of GiB"):
            config(Path("x"), memory_limit=value)
    if value is not True:
        with pytest.raises(UserError, match=r"data\.in_memory"):
            config(Path("x"), in_memory=value)


def history(checkpoint: Path) -> list[dict[str, float]]:
    records = read_records(checkpoint.parent)
    for record in records:
        assert 0 < record["data_seconds"] < record["epoch_seconds"]
    return [{key: record[key] for key in ("train_loss", "val_loss", "val_accuracy")} for record in records]


def test_the_command_trains_on_folders_and_resumes_to_the_same(command: Command, kill: Kill, tmp_path: Path) -> None:
    colours = [np.full((24, 30, 3), 250 * (i % 2), dtype=np.uint8) for i in range(40)]
    write(tmp_path / "images", colours, suffix="jpg")
    here = ["data=image_folder", "data.root=images", "data.image_size=8", "data.in_memory=false", "data.num_workers=0"]
    here += ["model.width=4", "batch_policy.batch_size=8", "epochs=3", "tracking=none", "resume=auto"]
    result = command(*here, "hydra.run.dir=once")
    assert result.returncode == 0, result.stderr
    assert "80 images, 1.8e-05 GiB decoded: read by the process that trains" in result.stdout
    assert "share of an epoch spent waiting for data" in result.stdout
    there = [*here, "hydra.run.dir=twice"]
    kill("step:8", *there)
    assert command(*there).returncode == 0
    once, twice = (history(tmp_path / name / "last.pt") for name in ("once", "twice"))
    assert once == twice
    assert once[-1]["val_accuracy"] == 1.0


class Folders(NamedTuple):
    """What one of two processes has made of folders."""

    workers: list[int]
    read: int  # files, for a set in memory
    train: np.ndarray
    val: np.ndarray
    kept: list[bool]  # in memory
    other: list[str]  # what it is told if the hosts have other images
    broken: list[str]  # or if one of them has a mistake


def folders_of_several(roots: list[Path]) -> Folders:
    """Folders that are the same for both, ones where they differ, and ones where one has a mistake."""
    same, other, broken = roots[0], roots[world.rank()], roots[2 * world.rank()]
    read: list[str] = []
    original = image_files.rgb

    def counted(path: str) -> Image.Image:
        read.append(path)
        return original(path)

    world.local = world.Local(world.rank(), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "allowed", lambda: frozenset(range(8)))
        workers = [image_folder.worker_count(wanted, divided=True) for wanted in ("auto", 0, 1, 7)]
        patch.setattr(image_files, "rgb", counted)
        data = image_folder.build(config(same, in_memory=True))
        number, kept, needed = len(read), [], 4 * 120 * 3 * 20**2  # a quarter of the memory may be used
        for limits in ((2 * needed, needed), (2 * needed, needed - 4)):
            patch.setattr(memory_limit, "CONTAINER_LIMIT", limit := roots[3] / f"limit{world.rank()}")
            limit.write_text(f"{limits[world.rank()]}\n")
            kept.append(isinstance(image_folder.build(config(same, in_memory="auto")), ByteData))
    messages = []
    for root in (other, broken):
        for in_memory in (False, True):
            with pytest.raises(UserError) as caught:
                image_folder.build(config(root, in_memory=in_memory))
            messages.append(str(caught.value))
    train, val = data.train.pixels.numpy(), data.val.pixels.numpy()
    return Folders(workers, number, train, val, kept, messages[:2], messages[2:])


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Folders]]:
    images = noise([(40 + i, 50) for i in range(60)])
    roots = [write(tmp_path_factory.mktemp(name), images) for name in ("same", "other", "broken")]
    (roots[1] / "train" / "class_1" / "003.png").rename(roots[1] / "train" / "class_1" / "004.png")
    remove(*(roots[2] / "val").iterdir(), roots[2] / "val")
    return roots, in_ranks(2, folders_of_several, [*roots, tmp_path_factory.mktemp("limits")])


def test_workers_are_divided_among_the_processes_of_a_host(several: tuple[list[Path], list[Folders]]) -> None:
    assert [found.workers for found in several[1]] == [[3, 0, 1, 4]] * 2


def test_a_set_in_memory_is_decoded_by_one_process_of_a_host(several: tuple[list[Path], list[Folders]]) -> None:
    alone = image_folder.build(config(several[0][0], in_memory=True))
    assert alone.train.pixels.nbytes >= host.SMALL
    for found in several[1]:
        assert np.array_equal(found.train, alone.train.pixels)
        assert np.array_equal(found.val, alone.val.pixels)
    if sys.platform == "linux":
        assert [found.read for found in several[1]] == [120, 0]


def test_the_host_with_the_least_memory_decides_for_all(several: tuple[list[Path], list[Folders]]) -> None:
    assert [found.kept for found in several[1]] == [[True, False]] * 2


def test_hosts_with_other_images_are_named_in_all_processes(several: tuple[list[Path], list[Folders]]) -> None:
    for root, found in zip(several[0], several[1], strict=False):
        for message in found.other:
            assert message.startswith(f"data.root={root}: ")
            assert "has other images there (120) than" in message
            assert "\n" not in message


def test_a_mistake_on_one_host_is_told_in_all_processes(several: tuple[list[Path], list[Folders]]) -> None:
    first, second = several[1]
    assert first.broken == second.broken
    assert f"data.root={several[0][2]}: there is no directory" in first.broken[0]


@pytest.mark.gpu
@KINDS
def test_a_device_sees_the_same_crops(in_memory: bool, tmp_path: Path) -> None:
    data = image_folder.build(config(write(tmp_path, noise(ODD_SIZES)), in_memory=in_memory))
    moved = data.to(torch.device("cuda"))
    for a, b in ((epoch(data, 4, 1)[0], epoch(moved, 4, 1)[0]), (held_out(data), held_out(moved))):
        assert b.is_cuda
        torch.testing.assert_close(b.cpu(), a, atol=1e-4, rtol=0)
