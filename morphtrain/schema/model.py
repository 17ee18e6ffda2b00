"""Options of the group `model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.custom import Custom, check_plain
from morphtrain.schema.option import OPTIONS, Option

IMAGE_KINDS = ("cifar", "imagenet")  # what stems and heads are made for: small images, large images


@dataclass(kw_only=True)
class Weights:
    """What a network starts from: a key of every option, the user's own network included."""

    weights: str | None = None

    def __post_init__(self) -> None:
        wanted = "the path of trained weights, with model=torchvision also their name there, or null"
        check(self.weights != "", "model.weights", self.weights, wanted)


@dataclass
class Model(Weights, Option, group="model"):
    """Base of the networks."""


@dataclass
class ResNet(Model, option="resnet"):
    """A residual network of basic or bottleneck blocks."""

    stages: int
    blocks: Any  # int, or one int per stage
    layers: int
    bottleneck: bool
    width: int
    downsample: bool
    shortcut: str
    stem: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.stages >= 1, "model.stages", self.stages, "1 or more")
        self._check_blocks()
        least = 3 if self.bottleneck else 1
        check(self.layers >= least, "model.layers", self.layers, f"{least} or more")
        check(self.width >= 1, "model.width", self.width, "1 or more channels")
        check_one_of("model.shortcut", self.shortcut, ("A", "B"))
        check_one_of("model.stem", self.stem, IMAGE_KINDS)

    def _check_blocks(self) -> None:
        numbers = self.blocks if isinstance(self.blocks, list) else [self.blocks]
        fits = not isinstance(self.blocks, list) or len(numbers) == self.stages
        whole = all(type(n) is int and n >= 1 for n in numbers)
        wanted = f"a whole number of 1 or more, or a list of {self.stages} such numbers (model.stages={self.stages})"
        check(fits and whole, "model.blocks", self.blocks, wanted)


@dataclass
class VGG(Model, option="vgg"):
    """A VGG network."""

    depth: int
    width: int
    batch_norm: bool
    head: str
    dropout: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("model.depth", self.depth, (8, 11, 13, 16))
        check(self.width >= 1, "model.width", self.width, "1 or more channels")
        check_one_of("model.head", self.head, IMAGE_KINDS)
        _check_dropout(self.dropout)


@dataclass
class AlexNet(Model, option="alexnet"):
    """AlexNet."""

    stem: str
    batch_norm: bool
    dropout: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("model.stem", self.stem, IMAGE_KINDS)
        _check_dropout(self.dropout)


@dataclass
class MobileNet(Model, option="mobilenet"):
    """MobileNet v1 or v2."""

    version: int
    width_multiplier: float
    stem: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("model.version", self.version, (1, 2))
        check(self.width_multiplier > 0, "model.width_multiplier", self.width_multiplier, "above 0")
        check_one_of("model.stem", self.stem, IMAGE_KINDS)


@dataclass
class Torchvision(Model, option="torchvision"):
    """A torchvision network; `name` is its name there, so `source` identifies this option."""

    source: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        # A checkpoint's `options` are checked here, too: none of them may name a file to load.
        pretrained = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")
        for key, value in self.options.items():
            wanted = "left out: model.weights says what training starts from"
            check(key not in pretrained, f"model.options.{key}", value, wanted)
            check(key != "num_classes", f"model.options.{key}", value, "left out: the data decides it")
            check_plain(f"model.options.{key}", key, value)


@dataclass
class CustomModel(Custom, Weights):
    """A network of the user's own, and what it starts from."""


OPTIONS[Model.group]["custom"] = CustomModel


def _check_dropout(dropout: float | None) -> None:
    check(dropout is None or 0 <= dropout < 1, "model.dropout", dropout, "0 or more and below 1, or null")
