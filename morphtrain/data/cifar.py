"""CIFAR-10 and CIFAR-100: read from `data.root`, or downloaded by torchvision."""

from __future__ import annotations

import torch

from morphtrain import host, schema
from morphtrain.data.download import load
from morphtrain.data.images import ImageData, Images, published


def build_cifar(dataset: str, config: schema.data.Downloaded) -> ImageData:
    """torchvision's `dataset`: 50000 training and 10000 test images of 32x32 RGB pixels.

    Raises:
        UserError: if it is not in `config.root` and cannot be downloaded.
    """
    return host.shared(lambda: _loaded(dataset, config))


def _loaded(dataset: str, config: schema.data.Downloaded) -> ImageData:
    sets = []
    for train in (True, False):
        stored = load(dataset, config, train)
        sets.append(Images(torch.from_numpy(stored.data).permute(0, 3, 1, 2), torch.tensor(stored.targets)))
    return published(sets[0], sets[1], stored.classes, config)
