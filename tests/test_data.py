"""Data sets: reproducible, augmented per sample, held-out images the same for every seed."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from morphtrain import schema
from morphtrain.data import ImageData, Images, digits, fashion_mnist, synthetic


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


def test_digits_hold_out_the_same_stratified_images() -> None:
    data = digits.build(schema.Digits("digits", 16, 1))
    assert data.input_shape == (1, 16, 16)
    assert (len(data.train), len(data.val)) == (1437, 360)
    assert torch.bincount(data.val.labels).min() >= 34
    assert abs(data.train.pixels.mean()) < 1e-4
    assert abs(data.train.pixels.std() - 1) < 1e-4
    known = {tuple(image.flatten().tolist()) for image in data.train.pixels}
    assert sum(tuple(image.flatten().tolist()) in known for image in data.val.pixels) == 0


def test_synthetic_data_can_be_learned_and_repeated() -> None:
    config = schema.Synthetic("synthetic", 100, 50, 8, 3, 4, 0.1)
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
    config = schema.Downloaded("fashion_mnist", str(tmp_path / "none"), False, 0, False, 20)
    data = fashion_mnist.build(config)
    assert data.input_shape == (1, 28, 28)
    assert (len(data.train), len(data.val)) == (20, 10)
    assert data.val.labels.tolist() == list(range(10))
    raw = torch.tensor([i % 251 for i in range(20 * 784)]).float()
    torch.testing.assert_close(data.train.pixels.flatten(), (raw - raw.mean()) / raw.std())


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    data = fashion_mnist.build(schema.Downloaded("fashion_mnist", "nowhere", False, 2, True, None))
    assert (len(data.train), len(data.val)) == (60000, 10000)
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
