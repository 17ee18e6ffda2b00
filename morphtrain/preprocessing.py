"""A network's inputs and outputs: how pixels are normalised, the size of an image, the names of the classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from morphtrain.contracts import Data
from morphtrain.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input, (pixels - mean) / std of each channel, and what the outputs stand for.

    None is what nobody has said, as with a data set of your own that has no `preprocessing`.

    Args:
        mean, std: of each channel, in the units of the pixels; three channels are red, green and blue.
        max_pixel: a pixel of full brightness, which says what these units are: 255 for images of 8 bits. Divided by it,
            `mean` and `std` fit pixels between 0 and 1.
        resize: pixels of the shorter side that an image is resized to, before its centre is cut out in the input's
            size. None: images are not resized.
        input_shape: of one image, (channels, height, width).
        num_classes: outputs of the network.
        classes: their names, in order.

    Raises:
        UserError: naming the field, for a value of the wrong kind or length.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    max_pixel: float | None = None
    resize: int | None = None
    input_shape: Sequence[int] | None = None
    num_classes: int | None = None
    classes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for field in ("mean", "std", "input_shape", "classes"):  # tuples, so that equal ones are equal
            if isinstance(value := getattr(self, field), list):
                object.__setattr__(self, field, tuple(value))
        self._check("input_shape", _are(_is_count, self.input_shape, 3), "(channels, height, width)")
        channels = None if self.input_shape is None else self.input_shape[0]
        self._check("mean", _are(_is_number, self.mean, channels), "a number for each channel")
        self._check("std", _are(_is_positive, self.std, channels), "a number above 0 for each channel")
        self._check("max_pixel", _is_positive(self.max_pixel), "a number above 0")
        self._check("resize", _is_count(self.resize), "a whole number of pixels, 1 or more")
        self._check("num_classes", _is_count(self.num_classes), "a whole number, 1 or more")
        self._check("classes", _are(_is_text, self.classes, self.num_classes), "a name for each class")

    def _check(self, field: str, right: bool, wanted: str) -> None:
        value = getattr(self, field)
        if value is not None and not right:
            raise UserError(f"preprocessing.{field}={value!r}: must be {wanted}, or None")

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (..., C, H, W) of the input's size, normalised as they were for the network; nothing is resized.

        Raises:
            UserError: if mean and std are not known, or for pixels of another size.
        """
        if self.mean is None or self.std is None:
            raise UserError("preprocessing: mean and std are not known, since the data set has not said them")
        found = tuple(pixels.shape[-3:])
        if self.input_shape is not None and found != tuple(self.input_shape):
            raise UserError(f"preprocessing: the network takes images of {tuple(self.input_shape)}, these are {found}")
        pixels = pixels if pixels.is_floating_point() else pixels.float()
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    @property
    def unknown(self) -> list[str]:
        """The names of the fields that nobody has said; `resize` may be None by right."""
        return [f.name for f in fields(self) if getattr(self, f.name) is None and f.name != "resize"]


def of_data(data: Data) -> Preprocessing:
    """What a data set says about itself, which is optional, and what it shows.

    Raises:
        UserError: if its `preprocessing` is something else, or does not fit its images and classes.
    """
    said = getattr(data, "preprocessing", None) or Preprocessing()
    if not isinstance(said, Preprocessing):
        wanted = "a morphtrain.preprocessing.Preprocessing"
        raise UserError(f"its preprocessing is a {type(said).__name__}; {wanted} is needed, or none")
    return replace(said, input_shape=tuple(data.input_shape), num_classes=data.num_classes)


def of_json(found: Any) -> Preprocessing:
    """The inverse of `dataclasses.asdict` after JSON.

    Raises:
        UserError: for anything else.
    """
    known = {f.name for f in fields(Preprocessing)}
    if not isinstance(found, Mapping) or not known >= found.keys():
        raise UserError(f"preprocessing={found!r}: must be a dict with {', '.join(sorted(known))}")
    return Preprocessing(**found)


def _are(is_one: Any, values: Any, count: int | None) -> bool:
    """Whether these are a sequence of `count` such values; None: of any number."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        return False
    return (count is None or len(values) == count) and all(map(is_one, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
