"""A torchvision network by name.

python -m morphtrain.run model=torchvision model.name=densenet121 data=cifar10 +model.options.drop_rate=0.1
python -m morphtrain.run model=torchvision model.name=resnet18 model.weights=DEFAULT data=image_folder data.root=photos
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from morphtrain import schema
from morphtrain.errors import UserError, said
from morphtrain.preprocessing import Preprocessing

# By default these two have three outputs in training and warn about their slow initialisation.
INCEPTION = ("googlenet", "inception_v3")
INCEPTION_KEYWORDS = {"aux_logits": False, "init_weights": True}
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # of their published files


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


def published(config: schema.model.Torchvision) -> tuple[Path, dict[str, torch.Tensor], Preprocessing] | None:
    """The weights that torchvision publishes under the name `model.weights`; None if that is the path of a file.

    Returns:
        the file that torchvision has downloaded, the tensors in it as the network of `build` names them, and the
        images that they were trained on.

    Raises:
        UserError: for a name that the network does not have, or weights that cannot be downloaded.
    """
    from torchvision import models

    assert config.weights is not None
    given = f"model.weights={config.weights}"
    _check_known(f"model.name={config.name}", "torchvision", "network for classification", str(config.name), names())
    known = models.get_model_weights(config.name)
    name = config.weights.removeprefix(f"{known.__name__}.")
    if name not in known.__members__ and (set("./") & set(name) or Path(name).is_file()):
        return None
    _check_known(given, config.name, "weights, and there is no such file", name, list(known.__members__))
    if config.name in INCEPTION and not config.options.get("transform_input"):
        wanted = "it has to transform its images as in its training; +model.options.transform_input=true works"
        raise UserError(f"{given}: of {config.name}, {wanted}")
    weights: Any = known[name]
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # without a network: OSError; of a damaged file: nearly everything
        hint = f"a copy as {file} needs no network, and the path of a file works"
        raise UserError(f"{given}: {weights.url} cannot be had ({said(error)}); {hint}") from error
    tensors = {_renamed(key): tensor for key, tensor in tensors.items() if not key.startswith(AUXILIARY)}
    return file, tensors, _images_of(weights)


def _renamed(key: str) -> str:
    """DenseNet's published files have the names of an older version, as `norm.1` (see torchvision's densenet.py)."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)


def _images_of(weights: Any) -> Preprocessing:
    """The images that published weights were trained on."""
    shown = weights.transforms()
    side = shown.crop_size[0]
    classes = weights.meta["categories"]
    return Preprocessing(
        shown.mean, shown.std, 1, shown.resize_size[0], (3, side, side), num_classes=len(classes), classes=classes
    )


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
