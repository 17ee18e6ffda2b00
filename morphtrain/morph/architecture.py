"""A morphed architecture as data: what a checkpoint needs to rebuild a network from the one it started as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from morphtrain.morph.layers import PadChannels, ZeroBranch


def describe(model: nn.Module) -> dict[str, Any]:
    """The structure of `model` beyond its constructor: plain JSON data, for `rebuild`."""
    modules = dict(model.named_modules())
    return {
        "zero_branches": [path for path, m in modules.items() if isinstance(m, ZeroBranch)],
        "paddings": {path: [m.left, m.right] for path, m in modules.items() if isinstance(m, PadChannels)},
        "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
    }


def rebuild(model: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built `model` the structure `describe` recorded; tensor values are left to `load_state_dict`."""
    for path in description["zero_branches"]:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        norm = [m for m in model.get_submodule(path).modules() if hasattr(m, "num_features")][-1]
        setattr(parent, name, ZeroBranch(norm))
    for path, (left, right) in description["paddings"].items():
        padding = model.get_submodule(path)
        padding.left, padding.right = left, right
    for name, shape in description["shapes"].items():
        path, _, tensor_name = name.rpartition(".")
        module = model.get_submodule(path)
        _resize(module, tensor_name, torch.Size(shape))
    for module in model.modules():
        refresh_widths(module)
    return model


def refresh_widths(module: nn.Module) -> None:
    """Set the width attributes that torch keeps beside the tensors (in_channels, num_features, ...) to the tensors'."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        depthwise = module.groups == module.in_channels == module.out_channels
        module.out_channels = module.weight.shape[0]
        if depthwise and module.groups > 1:
            module.groups = module.out_channels
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        width = module.weight if module.weight is not None else module.running_mean
        if width is not None:
            module.num_features = len(width)


def _resize(module: nn.Module, name: str, shape: torch.Size) -> None:
    old = getattr(module, name)
    if old.shape == shape:
        return
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
