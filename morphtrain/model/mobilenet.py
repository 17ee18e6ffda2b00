"""MobileNet v1 (Howard et al. 2017, arXiv 1704.04861) and v2 (Sandler et al. 2018, arXiv 1801.04381).

python -m morphtrain.run model=mobilenet_v2 data=cifar10 model.width_multiplier=0.5
"""

from __future__ import annotations

import torch
from torch import nn

from morphtrain import schema
from morphtrain.initialise import initialise

# v1, table 1: (channels, stride) of each depthwise separable convolution. The table's last stride of 2 is a misprint:
# there the output has the same size as the input.
V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# v2, table 2: (expansion, channels, blocks, stride of the first block).
V2 = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
STEM = 32  # channels of the first convolution
V2_LAST = 1280  # channels of version 2's last convolution


class MobileNet(nn.Module):
    """Depthwise 3x3 convolutions over space, 1x1 convolutions over channels, global average pooling, a linear layer.

    Args:
        version: 1: depthwise separable convolutions; 2: inverted residual blocks.
        width_multiplier: multiplies all widths, which are then rounded to multiples of 8 (see `rounded`); in version 2
            the last convolution is never narrower than 1280.
        stem: "imagenet": the resolution is halved five times; "cifar": the first two of these halvings are left out,
            so that 32x32 pixels end as 4x4.
        num_classes: outputs.
        in_channels: channels of the images.

    Raises:
        ValueError: for another `version` or `stem`.
    """

    def __init__(
        self,
        *,
        version: int = 2,
        width_multiplier: float = 1.0,
        stem: str = "cifar",
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version={version}: must be 1 or 2")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem={stem!r}: must be 'cifar' or 'imagenet'")
        strides = _Strides(left_out=2 if stem == "cifar" else 0)
        channels = rounded(STEM * width_multiplier)
        activation = nn.ReLU if version == 1 else nn.ReLU6
        self.features = nn.Sequential(
            nn.Sequential(*conv_norm(in_channels, channels, 3, strides.next(2)), activation())
        )
        blocks = _separable if version == 1 else _inverted_residual
        channels = blocks(self.features, channels, width_multiplier, strides)
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)  # (B, C, H', W')
        return self.classifier(x.mean((2, 3)))  # (B, num_classes)


class InvertedResidual(nn.Module):
    """branch(x) + x: widen with 1x1, filter with a depthwise 3x3, narrow with 1x1 and no activation (v2, figure 3).

    Where the number of channels or the resolution changes, x cannot be added, and the block is just its branch.
    """

    def __init__(self, channels: int, out: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.branch = nn.Sequential()
        if expansion > 1:
            self.branch.extend([*conv_norm(channels, inner, 1), nn.ReLU6()])
        self.branch.extend([*conv_norm(inner, inner, 3, stride, groups=inner), nn.ReLU6()])
        self.branch.extend(conv_norm(inner, out, 1))
        self.residual = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.residual:
            return self.branch(x) + x
        out: torch.Tensor = self.branch(x)
        return out


class _Strides:
    """Returns the paper's strides, except that the first `left_out` strides of 2 become 1."""

    def __init__(self, left_out: int) -> None:
        self.left_out = left_out

    def next(self, stride: int) -> int:
        if stride == 1 or self.left_out == 0:
            return stride
        self.left_out -= 1
        return 1


def _separable(features: nn.Sequential, channels: int, multiplier: float, strides: _Strides) -> int:
    """Append version 1's blocks to `features`; returns the channels of the last block."""
    for width, stride in V1:
        out = rounded(width * multiplier)
        depthwise = conv_norm(channels, channels, 3, strides.next(stride), groups=channels)
        features.append(nn.Sequential(*depthwise, nn.ReLU(), *conv_norm(channels, out, 1), nn.ReLU()))
        channels = out
    return channels


def _inverted_residual(features: nn.Sequential, channels: int, multiplier: float, strides: _Strides) -> int:
    """Append version 2's blocks and last convolution to `features`; returns the channels of that convolution."""
    for expansion, width, blocks, stride in V2:
        out = rounded(width * multiplier)
        for block in range(blocks):
            features.append(InvertedResidual(channels, out, expansion, strides.next(stride if block == 0 else 1)))
            channels = out
    last = rounded(V2_LAST * max(1.0, multiplier))
    features.append(nn.Sequential(*conv_norm(channels, last, 1), nn.ReLU6()))
    return last


def conv_norm(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A padded convolution without bias, and a batch norm."""
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out)]


def rounded(width: float, multiple: int = 8) -> int:
    """The multiple nearest to `width`, raised by one if it is below 0.9 * `width`; at least `multiple` (v2's code)."""
    nearest = max(multiple, int(width + multiple / 2) // multiple * multiple)
    return nearest if nearest >= 0.9 * width else nearest + multiple


def build(config: schema.model.MobileNet, num_classes: int, in_channels: int) -> MobileNet:
    """The network of the config group `model`, for data with this many classes and image channels."""
    return MobileNet(num_classes=num_classes, in_channels=in_channels, **schema.keywords(config))
