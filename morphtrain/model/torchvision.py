"""A torchvision network by name, with fresh weights.

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
from morphtrain.errors import UserError, said

# By default these two have three outputs in training and warn about their slow initialisation.
INCEPTION = ("googlenet", "inception_v3")
INCEPTION_KEYWORDS = {"aux_logits": False, "init_weights": True}


def names() -> list[str]:
    """The names of torchvision's classification networks, without those for detection, segmentation, video and int8."""
    from torchvision import models  # takes a second, and only this option needs it

    found: list[str] = models.list_models(module=models)
    return found


def build(config: schema.model.Torchvision, num_classes: int, in_channels: int) -> nn.Module:
    """The network `model.name`, for data with this many classes and image channels.

    Raises:
        UserError: for a name that torchvision does not have, or options that the network does not accept.
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
    except Exception as error:
        reason = said(error)
        raise UserError(f"model.options={config.options}: {config.name} does not accept them: {reason}") from error
    return network if in_channels == 3 else adapt(network, in_channels)


def keywords(name: str) -> list[str]:
    """The keywords that any function or class in the module of network `name` takes.

    Some constructors (MobileNetV3, ConvNeXt) silently ignore unknown keywords, and so would hide a typing error.
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
    """Change a network made for images of 3 channels, in place, to take `in_channels`.

    torchvision's constructors have no keyword for this. The first convolution is replaced by one that differs only in
    its input channels, with torch's default initialisation for the new fan-in. The networks' own constructors draw with
    other variances, but that does not matter: in nearly all of them a norm follows.
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
