"""Further transforms of single training images: torchvision's (`torchvision.transforms.v2`), or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from morphtrain import custom
from morphtrain.errors import UserError, said
from morphtrain.part_checks import check_tensor
from morphtrain.schema import Custom
from morphtrain.schema.transforms import transform_of

Step = Callable[[Any], Any]


class Transforms:
    """Transforms of an 8-bit image, one after another; after the last it has the size that it had.

    Args:
        steps: each with its name for messages, the config key and its value.
    """

    def __init__(self, steps: Sequence[tuple[str, Step]]) -> None:
        self.steps = steps

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """An image (3, S, S), uint8, that depends only on the image and the state of `generator`, which stays as it is.

        Transforms draw from torch's own random numbers, which are those of `generator` meanwhile.

        Raises:
            UserError: naming a transform that fails, or that leaves another size, type or number of channels.
        """
        wanted, changed_by, image = _kind(pixels), "", pixels
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            for name, step in self.steps:
                before = _kind(image)
                image = _applied(name, step, image)
                if _kind(image) != before:
                    changed_by = name
        if _kind(image) != wanted:
            check_tensor(f"{changed_by}: gives an image", image, torch.uint8, tuple(pixels.shape))
        return image.as_subclass(torch.Tensor)  # of a `tv_tensors.Image`, too


def _kind(image: Any) -> object:
    return (tuple(image.shape), image.dtype) if isinstance(image, torch.Tensor) else type(image)


def _applied(name: str, step: Step, image: Any) -> Any:
    try:
        return step(image)
    except Exception as error:
        raise UserError(f"{name}: called with an image {_shown(image)}: {said(error)}") from error


def _shown(image: Any) -> str:
    if not isinstance(image, torch.Tensor):
        return f"of type {type(image).__name__}"
    return f"{tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}"


def build_transforms(transforms: Sequence[Custom], image_size: int) -> Transforms | None:
    """The transforms of `data.transforms`, tried on an image of noise; None if there are none.

    Raises:
        UserError: naming one that cannot be made, or that does not give the images that are needed.
    """
    if not transforms:
        return None
    keys = [f"data.transforms[{number}]" for number in range(len(transforms))]
    steps = [(f"{key}._target_={one._target_}", _made(key, one)) for key, one in zip(keys, transforms, strict=True)]
    made, generator = Transforms(steps), torch.Generator().manual_seed(0)
    made(torch.randint(256, (3, image_size, image_size), generator=generator).to(torch.uint8), generator)
    return made


def _made(key: str, config: Custom) -> Step:
    """A transform; what can be seen to make none is not called."""
    make = custom.find(key, config._target_)
    name = f"{key}._target_={config._target_}"
    made = make if isinstance(make, type) else custom.annotated(make)
    if made is not None and made is not object and not issubclass(made, Callable):  # type: ignore[arg-type]
        raise UserError(f"{name}: makes a {made.__name__}, not a function of an image (3, H, W), uint8")
    arguments = {argument: _argument(f"{key}.{argument}", value) for argument, value in config.arguments.items()}
    step = custom.construct(key, make, replace(config, arguments=arguments), {})
    if not callable(step):
        raise UserError(f"{name}: makes a {type(step).__name__}, not a function of an image (3, H, W), uint8")
    return step


def _argument(key: str, value: Any) -> Any:
    """A keyword's value; nodes in it that have a `_target_` are transforms themselves, as those of RandomApply are."""
    if isinstance(value, list):
        return [_argument(f"{key}[{number}]", one) for number, one in enumerate(value)]
    if isinstance(value, dict) and "_target_" in value:
        return _made(key, transform_of(key, value))
    return value
