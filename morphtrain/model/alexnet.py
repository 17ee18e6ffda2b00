"""The one-tower AlexNet (Krizhevsky 2014, arXiv 1404.5997, footnote 1), for small and large images.

python -m morphtrain.run model=alexnet data=cifar10
"""

from __future__ import annotations

import torch
from torch import nn

from morphtrain import schema
from morphtrain.initialise import initialise

HIDDEN = 4096  # features of the ImageNet head's hidden layers


class AlexNet(nn.Module):
    """Five convolutions of 64, 192, 384, 256 and 256 channels, three of them pooled, and a head of linear layers.

    Args:
        stem: "cifar", for images of any size: padding of 5 instead of 2 around the first convolution (11x11, stride 4),
            2x2 max pooling that rounds up, global average pooling and one linear layer, as in PruneTrain's CIFAR
            experiments. "imagenet", for images of 63x63 or more: 3x3 max pooling, average pooling to 6x6, two hidden
            layers of 4096 features.
        batch_norm: a batch norm after every convolution; the paper has none.
        dropout: share of features dropped before every linear layer except the last of the ImageNet head.
            None: 0.5 in the ImageNet head, as in the paper, and 0 in the CIFAR head.
        num_classes: outputs.
        in_channels: channels of the images.

    Raises:
        ValueError: for another `stem`.
    """

    def __init__(
        self,
        *,
        stem: str = "cifar",
        batch_norm: bool = False,
        dropout: float | None = None,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem={stem!r}: must be 'cifar' or 'imagenet'")
        small = stem == "cifar"
        layers = [  # channels, kernel, stride, padding, pooled
            (64, 11, 4, 5 if small else 2, True),
            (192, 5, 1, 2, True),
            (384, 3, 1, 1, False),
            (256, 3, 1, 1, False),
            (256, 3, 1, 1, True),
        ]
        self.features = nn.Sequential()
        channels = in_channels
        for out, kernel, stride, padding, pooled in layers:
            self.features.append(nn.Conv2d(channels, out, kernel, stride, padding))
            if batch_norm:
                self.features.append(nn.BatchNorm2d(out))
            self.features.append(nn.ReLU())
            if pooled:
                self.features.append(nn.MaxPool2d(2, ceil_mode=True) if small else nn.MaxPool2d(3, 2))
            channels = out
        self.pool = nn.AdaptiveAvgPool2d(1 if small else 6)
        self.classifier = _head(small, channels, dropout, num_classes)
        self.apply(initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)  # (B, 256, H / 32, W / 32)
        return self.classifier(self.pool(x).flatten(1))  # (B, num_classes)


def _head(small: bool, channels: int, dropout: float | None, num_classes: int) -> nn.Sequential:
    if small:
        return nn.Sequential(nn.Dropout(dropout or 0.0), nn.Linear(channels, num_classes))
    share = 0.5 if dropout is None else dropout
    hidden: list[nn.Module] = []
    for features in (channels * 6 * 6, HIDDEN):
        hidden += [nn.Dropout(share), nn.Linear(features, HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, num_classes))


def build(config: schema.model.AlexNet, num_classes: int, in_channels: int) -> AlexNet:
    """The network of the config group `model`, for data with this many classes and image channels."""
    return AlexNet(num_classes=num_classes, in_channels=in_channels, **schema.keywords(config))
