"""A network of torchvision by its name, with fresh weights.

python -m morphtrain.run model=torchvision model.name=densenet121 data=cifar10 +model.options.drop_rate=0.1
"""

from __future__ import annotations

import copy
import difflib
import inspect
import sys
from typing import Any

from torch import nn

from morphtrain import schema
from morphtrain.errors import UserError, first_line

# These two give three outputs while they train, and warn about their slow initial draw, unless told otherwise.
INCEPTION = ("googlenet", "inception_v3")
INCEPTION_KEYWORDS = {"aux_logits": False, "init_weights": True}


def names() -> list[str]:
    """The networks for classification; those for detection, segmentation, video and int8 have modules of their own."""
    from torchvision import models  # takes a second, and is needed by this option alone

    found: list[str] = models.list_models(module=models)
    return found


def build(config: schema.model.Torchvision, num_classes: int, in_channels: int) -> nn.Module:
    """The network `model.name`, for data of these classes and image channels.

    Raises:
        UserError: for a name torchvision does not have, or options the network refuses.
    """
    _check_known(f"model.name={config.name}", "torchvision", "network for classification", str(config.name), names())
    from torchvision import models

    known = keywords(config.name)
    for key, value in config.options.items():
        _check_known(f"model.options.{key}={value}", config.name, "keyword", key, known)
    options: dict[str, Any] = INCEPTION_KEYWORDS if config.name in INCEPTION else {}
    options = options | copy.deepcopy(config.options)
    try:
        network: nn.Module = models.get_model(config.name, weights=None, num_classes=num_classes, **options)
    except (TypeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"model.options={config.options}: {config.name} cannot be made with them: {reason}") from error
    return network if in_channels == 3 else adapt(network, in_channels)


def keywords(name: str) -> list[str]:
    """Keywords that some function or class of the network's own module takes.

    Some constructors swallow any others without a word (MobileNetV3, ConvNeXt), and a typing error with them.
    """
    from torchvision import models

    module = sys.modules[models.get_model_builder(name).__module__]
    own = [member for member in vars(module).values() if getattr(member, "__module__", None) == module.__name__]
    makers = [m for m in own if inspect.isfunction(m) or (inspect.isclass(m) and issubclass(m, nn.Module))]
    found = {parameter for maker in makers for parameter in inspect.signature(maker).parameters}
    return sorted(found - {"self", "args", "kwargs", "weights", "progress", "num_classes"})


def _check_known(given: str, owner: str, kind: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"{given}: {owner} has no such {kind}; {hint}")


def adapt(network: nn.Module, in_channels: int) -> nn.Module:
    """Let a network made for images of 3 channels take `in_channels`, in place.

    torchvision's constructors have no keyword for it. The first convolution is replaced by one that differs in nothing
    but its input, with weights as torch draws them for its new fan-in: a norm follows in nearly all of these networks,
    so it does not matter that their own constructors draw with other variances.
    """
    path, old = next((path, m) for path, m in network.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]  # pairs, which the constructor takes
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    network.set_submodule(path, new)
    return network
