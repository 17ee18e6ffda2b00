"""ResNets with any number of stages, blocks and layers, with or without bottlenecks (He et al. 2015, section 4.2).

python -m morphtrain.run model=resnet model.stages=2 model.blocks=[3,1] model.bottleneck=true model.layers=3
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from morphtrain import schema
from morphtrain.initialise import initialise
from morphtrain.morph.layers import PadChannels

EXPANSION = 4  # a bottleneck block's output width / its inner width


class ResNet(nn.Module):
    """A stem, `stages` stages of residual blocks whose width doubles, global average pooling, a classifier.

    Args:
        stages: number of stages; stage k = 0, 1, ... has inner width `width * 2**k`.
        blocks: residual blocks in every stage, or one number per stage.
        layers: convolutions per block.
        bottleneck: 1x1 convolutions first and last in a block, its output 4 times as wide as its inner width.
        width: channels of the stem, and inner width of the first stage.
        downsample: halve the resolution at every stage after the first. False: stride 1 in all stages.
        shortcut: where the width changes: "A" pads with zero channels, "B" projects with a 1x1 convolution.
        stem: "cifar": a 3x3 convolution; "imagenet": a 7x7 convolution of stride 2, then 3x3 max pooling of stride 2.
        num_classes: outputs.
        in_channels: channels of the images.

    Raises:
        ValueError: if `blocks` and `stages` disagree, a bottleneck block has fewer than 3 layers, or `stem` or
            `shortcut` is unknown.
    """

    def __init__(
        self,
        *,
        stages: int = 3,
        blocks: int | Sequence[int] = 3,
        layers: int = 2,
        bottleneck: bool = False,
        width: int = 16,
        downsample: bool = True,
        shortcut: str = "A",
        stem: str = "cifar",
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not isinstance(blocks, int) and len(blocks) != stages:
            raise ValueError(f"blocks={blocks}: must have one number per stage, with stages={stages}")
        if bottleneck and layers < 3:
            raise ValueError(f"layers={layers}: must be 3 or more with bottleneck=True")
        self.stem = _stem(in_channels, width, stem)
        self.stages = nn.Sequential()
        channels = width
        for stage in range(stages):
            count = blocks if isinstance(blocks, int) else blocks[stage]
            inner = width * 2**stage
            blocks_of_stage = nn.Sequential()
            self.stages.append(blocks_of_stage)
            for block in range(count):
                stride = 2 if downsample and stage > 0 and block == 0 else 1
                blocks_of_stage.append(ResidualBlock(channels, inner, layers, bottleneck, stride, shortcut))
                channels = inner * (EXPANSION if bottleneck else 1)
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))  # (B, width, H, W), with the ImageNet stem (B, width, H / 4, W / 4)
        x = self.stages(x)  # (B, C, H', W')
        return self.classifier(x.mean((2, 3)))  # (B, num_classes)


class ResidualBlock(nn.Module):
    """relu(branch(x) + shortcut(x)); the branch is a chain of convolutions, each with a norm, and relu in between."""

    def __init__(self, channels: int, inner: int, layers: int, bottleneck: bool, stride: int, shortcut: str) -> None:
        super().__init__()
        out = inner * (EXPANSION if bottleneck else 1)
        ends, strided = (0, layers - 1) if bottleneck else (), 1 if bottleneck else 0
        self.branch = nn.Sequential()
        for layer in range(layers):
            if layer:
                self.branch.append(nn.ReLU())
            before, after = (channels if layer == 0 else inner), (out if layer == layers - 1 else inner)
            self.branch.append(_conv(before, after, 1 if layer in ends else 3, stride if layer == strided else 1))
            self.branch.append(nn.BatchNorm2d(after))
        self.shortcut = _shortcut(channels, out, stride, shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2015: take every `stride`-th pixel and pad the missing channels with zeros."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = PadChannels((out - channels) // 2, out - channels - (out - channels) // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pad(x[:, :, :: self.stride, :: self.stride])


def _stem(channels: int, out: int, kind: str) -> nn.Sequential:
    if kind == "cifar":
        return nn.Sequential(_conv(channels, out, 3), nn.BatchNorm2d(out))
    if kind == "imagenet":
        # relu comes after the pooling, on a quarter of the values: the relu of a maximum is the maximum of the relus.
        return nn.Sequential(_conv(channels, out, 7, 2), nn.BatchNorm2d(out), nn.MaxPool2d(3, 2, padding=1))
    raise ValueError(f"stem={kind!r}: must be 'cifar' or 'imagenet'")


def _shortcut(channels: int, out: int, stride: int, option: str) -> nn.Module:
    if channels == out and stride == 1:
        return nn.Identity()
    if option == "A":
        return PaddedShortcut(channels, out, stride)
    if option == "B":
        return nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))
    raise ValueError(f"shortcut={option!r}: must be 'A' or 'B'")


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)


def build(config: schema.model.ResNet, num_classes: int, in_channels: int) -> ResNet:
    """The network of the config group `model`, for data with this many classes and image channels."""
    return ResNet(num_classes=num_classes, in_channels=in_channels, **schema.keywords(config))
