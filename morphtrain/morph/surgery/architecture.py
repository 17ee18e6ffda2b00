"""A changed architecture as data, from which a checkpoint rebuilds the network in a freshly built model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from morphtrain.morph.formats import format_of_model
from morphtrain.morph.layers import (
    Gated,
    Grown,
    InsertedBlock,
    InsertedLayer,
    NoChannels,
    ScatterChannels,
    SelectChannels,
    ZeroBranch,
)
from morphtrain.morph.surgery.insert import norm_like
from morphtrain.morph.surgery.widths import widths_of


def describe(model: nn.Module) -> dict[str, Any]:
    """The structure of `model` that its constructor does not give: plain JSON data for `rebuild`."""
    modules = dict(model.named_modules())
    return {
        "layers": {path: layer for path, module in modules.items() if (layer := _own_layer(module))},
        "widths": {path: widths for path, module in modules.items() if (widths := widths_of(module))},
        "shapes": _shapes(model),
    }


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of every tensor by name; of one that is computed (`torch.nn.utils.parametrize`) its own shape."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        before, found, after = name.partition("parametrizations.")
        plain = before + after.partition(".")[0] if found else name
        owner, _, tensor_name = plain.rpartition(".")
        shape = getattr(model.get_submodule(owner), tensor_name).shape if found else tensor.shape
        shapes[plain] = list(shape)
    return shapes


def rebuild(model: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give `model`, freshly built or changed less, the structure that `describe` recorded, and return it.

    The values of tensors are left to `load_state_dict`. A model in channels_last stays in channels_last.
    """
    channels_last = format_of_model(model) is torch.channels_last
    for path in sorted(description["layers"], key=lambda p: p.count(".")):
        facts = dict(description["layers"][path])
        present = dict(model.named_modules()).get(path)
        if present is not None and _own_layer(present) == facts:
            continue
        layer = facts.pop("layer")
        if layer in INSERTED:
            model.set_submodule(path, INSERTED[layer](model, facts).to(next(model.parameters()).dtype))
        else:
            model.set_submodule(path, REBUILD[layer](model.get_submodule(path), facts))
    for path, widths in description["widths"].items():
        module = model.get_submodule(path)
        for name, value in widths.items():
            setattr(module, name, value)
    resized: dict[int, torch.Tensor] = {}
    for name, shape in description["shapes"].items():
        path, _, tensor_name = name.rpartition(".")
        _resize(model.get_submodule(path), tensor_name, torch.Size(shape), resized)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _own_layer(module: nn.Module) -> dict[str, Any] | None:
    """How to make a layer of ours from the layer that it replaced; None for any other layer."""
    if isinstance(module, NoChannels):
        return {"layer": "no_channels", "stride": module.stride}
    if isinstance(module, ZeroBranch):
        kind = "norm" if module.norm is not None else "bias" if module.bias is not None else "zeros"
        return {"layer": f"zero_branch_{kind}", "channels": module.channels, "stride": module.stride}
    if isinstance(module, Gated):
        select, scatter = isinstance(module[0], SelectChannels), isinstance(module[-1], ScatterChannels)
        return {"layer": "gated", "select": select, "scatter": scatter}
    if isinstance(module, Grown):
        return {"layer": "grown", "in_front": isinstance(module[0], InsertedLayer)}
    if isinstance(module, InsertedLayer):
        return {"layer": "inserted_layer", **module.facts}
    if isinstance(module, InsertedBlock):
        return {"layer": "inserted_block", **module.facts}
    return None


def _zero_branch_norm(old: nn.Module, facts: dict[str, Any]) -> nn.Module:
    norm = [m for m in old.modules() if hasattr(m, "num_features") or hasattr(m, "num_channels")][-1]
    return ZeroBranch(norm=norm, **facts)


def _zero_branch_bias(old: nn.Module, facts: dict[str, Any]) -> nn.Module:
    biases = [m.bias for m in old.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    return ZeroBranch(bias=biases[-1], **facts)  # type: ignore[arg-type]


def _gated(old: nn.Module, facts: dict[str, Any]) -> nn.Module:
    select = [SelectChannels(torch.zeros(0, dtype=torch.long))] if facts["select"] else []
    scatter = [ScatterChannels(torch.zeros(0, dtype=torch.long), 0)] if facts["scatter"] else []
    return Gated(*select, old, *scatter)


REBUILD: dict[str, Callable[[nn.Module, dict[str, Any]], nn.Module]] = {
    "no_channels": lambda old, facts: NoChannels(**facts),
    "zero_branch_norm": _zero_branch_norm,
    "zero_branch_bias": _zero_branch_bias,
    "zero_branch_zeros": lambda old, facts: ZeroBranch(**facts),
    "gated": _gated,
    "grown": lambda old, facts: Grown(nn.Identity(), old) if facts["in_front"] else Grown(old),
}


# Layers that replaced nothing. Their widths are set afterwards, like those of all layers.
INSERTED: dict[str, Callable[[nn.Module, dict[str, Any]], nn.Module]] = {
    "inserted_layer": lambda model, facts: InsertedLayer(1, facts["kernel"], _norm(model, facts)),
    "inserted_block": lambda model, facts: InsertedBlock(
        1,
        1,
        facts["kernels"],
        [_norm(model, facts) for _ in facts["kernels"]] if facts["norm"] else [],
        facts["halves"],
        facts["activation"],
    ),
}


def _norm(model: nn.Module, facts: Mapping[str, Any]) -> Any:
    return norm_like(model, 1) if facts["norm"] else None


def _resize(module: nn.Module, name: str, shape: torch.Size, resized: dict[int, torch.Tensor]) -> None:
    """Replace a tensor by one of another shape; modules that shared the old one share the new one."""
    old = getattr(module, name)
    if old.shape == shape:
        return
    new = resized.get(id(old))
    if new is None:
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        resized[id(old)] = new
    setattr(module, name, new)
