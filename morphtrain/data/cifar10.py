"""CIFAR-10: read from `data.root`, or downloaded by torchvision."""

from __future__ import annotations

from morphtrain import schema
from morphtrain.data.cifar import build_cifar
from morphtrain.data.images import ImageData


def build(config: schema.data.Downloaded) -> ImageData:
    """50000 training and 10000 test images of 32x32 RGB pixels in 10 classes; raises like `build_cifar`."""
    return build_cifar("CIFAR10", config)
