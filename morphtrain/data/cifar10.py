"""CIFAR-10: from `data.root`, or downloaded by torchvision."""

from __future__ import annotations

import torch

from morphtrain import schema
from morphtrain.data.download import load
from morphtrain.data.images import ImageData, from_bytes


def build(config: schema.Downloaded) -> ImageData:
    """50000 training and 10000 test images of 32x32 RGB pixels in 10 classes."""
    sets = []
    for train in (True, False):
        stored = load("CIFAR10", config, train)
        sets.append((torch.from_numpy(stored.data).permute(0, 3, 1, 2), torch.tensor(stored.targets)))
    return from_bytes(sets[0], sets[1], 10, config.train_samples, config.shift, config.flip)
