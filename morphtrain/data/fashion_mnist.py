"""Fashion-MNIST: read from `data.root` or Debian's package, or downloaded by torchvision."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch

from morphtrain import host, schema
from morphtrain.data.download import load
from morphtrain.data.images import ImageData, Images, published

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def build(config: schema.data.Downloaded) -> ImageData:
    """60000 training and 10000 test images of 28x28 grey pixels in 10 classes.

    Raises:
        UserError: if there is no copy on this machine and it cannot be downloaded.
    """
    return host.shared(lambda: _loaded(config))


def _loaded(config: schema.data.Downloaded) -> ImageData:
    sets = []
    for train in (True, False):
        if DEBIAN.is_dir() and not (Path(config.root) / "FashionMNIST").is_dir():
            sets.append(_read_debian("train" if train else "t10k"))
        else:
            stored = load("FashionMNIST", config, train, hint="or install Debian's package dataset-fashion-mnist")
            sets.append(Images(stored.data[:, None], stored.targets))
    return published(sets[0], sets[1], CLASSES, config)


def _read_debian(part: str) -> Images:
    pixels = _read_idx(DEBIAN / f"{part}-images-idx3-ubyte.gz", header=16).view(-1, 1, 28, 28)
    return Images(pixels, _read_idx(DEBIAN / f"{part}-labels-idx1-ubyte.gz", header=8))


def _read_idx(path: Path, header: int) -> torch.Tensor:
    """The bytes after the header of an IDX file (LeCun's format)."""
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8, offset=header)
