"""VGG (Simonyan and Zisserman 2014, arXiv 1409.1556, table 1), with and without batch norm, for small and large images.

python -m morphtrain.run model=vgg11 data=cifar10 model.width=32
"""

from __future__ import annotations

import torch
from torch import nn

from morphtrain import schema
from morphtrain.initialise import initialise

# Depth to convolutions in each of the five stages; 11, 13 and 16 are A, B and D of the paper's table, 8 is from
# PruneTrain's CIFAR experiments.
STAGES = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
MULTIPLES = (1, 2, 4, 8, 8)  # of `width`, stage by stage
HIDDEN = 4096  # features of the ImageNet head's hidden layers


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each followed by max pooling, and a head of linear layers.

    Pooling rounds odd sizes up, so images of any size work.

    Args:
        depth: layers with weights, including those of the ImageNet head: 8, 11, 13 or 16.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        batch_norm: a batch norm after every convolution; the paper has none.
        head: "cifar": global average pooling and one linear layer; "imagenet": average pooling to 7x7 and two hidden
            layers of 4096 features.
        dropout: share of features dropped after every hidden layer, or before the only layer of the CIFAR head.
            None: 0.5 in the ImageNet head, as in the paper, and 0 in the CIFAR head.
        num_classes: outputs.
        in_channels: channels of the images.

    Raises:
        ValueError: for another `depth` or `head`.
    """

    def __init__(
        self,
        *,
        depth: int = 16,
        width: int = 64,
        batch_norm: bool = True,
        head: str = "cifar",
        dropout: float | None = None,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth={depth}: must be one of {', '.join(map(str, STAGES))}")
        self.features = nn.Sequential()
        channels = in_channels
        for count, multiple in zip(STAGES[depth], MULTIPLES, strict=True):
            for _ in range(count):
                # A norm makes the bias redundant; it stays, so that parameter counts match the published networks.
                self.features.append(nn.Conv2d(channels, width * multiple, 3, padding=1))
                if batch_norm:
                    self.features.append(nn.BatchNorm2d(width * multiple))
                self.features.append(nn.ReLU())
                channels = width * multiple
            self.features.append(nn.MaxPool2d(2, ceil_mode=True))
        self.pool, self.classifier = _head(head, channels, dropout, num_classes)
        self.apply(initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)  # (B, 8 * width, H / 32, W / 32)
        return self.classifier(self.pool(x).flatten(1))  # (B, num_classes)


def _head(kind: str, channels: int, dropout: float | None, num_classes: int) -> tuple[nn.Module, nn.Sequential]:
    """The last pooling, and the linear layers after it."""
    if kind == "cifar":
        return nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Dropout(dropout or 0.0), nn.Linear(channels, num_classes))
    if kind != "imagenet":
        raise ValueError(f"head={kind!r}: must be 'cifar' or 'imagenet'")
    share = 0.5 if dropout is None else dropout
    hidden: list[nn.Module] = []
    for features in (channels * 7 * 7, HIDDEN):
        hidden += [nn.Linear(features, HIDDEN), nn.ReLU(), nn.Dropout(share)]
    return nn.AdaptiveAvgPool2d(7), nn.Sequential(*hidden, nn.Linear(HIDDEN, num_classes))


def build(config: schema.model.VGG, num_classes: int, in_channels: int) -> VGG:
    """The network of the config group `model`, for data with this many classes and image channels."""
    return VGG(num_classes=num_classes, in_channels=in_channels, **schema.keywords(config))
