"""A changed architecture as data, from which a checkpoint rebuilds the network in a freshly built model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from morphtrain.errors import first_line
from morphtrain.morph.errors import MorphError
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
from morphtrain.morph.number_types import in_type, input_type
from morphtrain.morph.surgery.insert import norm_like
from morphtrain.morph.surgery.widths import widths_of
from morphtrain.plain_data import mismatch

# The types of what `describe` returns (`plain_data.mismatch`).
DESCRIPTION = {"layers": dict[str, dict[str, Any]], "widths": dict[str, dict[str, int]], "shapes": dict[str, list[int]]}


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

    The values of tensors are left to `load_state_dict`. A model in channels_last stays in channels_last. A description
    may come from anywhere: nothing but layers, widths and shapes is set.

    Raises:
        MorphError: for what is no description, or not one of such a model; `model` may be changed by then.
    """
    if wrong := mismatch(description, DESCRIPTION, "architecture"):
        raise MorphError(wrong)
    channels_last = format_of_model(model) is torch.channels_last
    largest = max(map(math.prod, description["shapes"].values()), default=0)
    try:
        for path in sorted(description["layers"], key=lambda p: p.count(".")):
            _put_layer(model, path, description["layers"][path])
        for path, widths in description["widths"].items():
            _set_widths(model.get_submodule(path), path, widths, largest)
        resized: dict[int, torch.Tensor] = {}
        for name, shape in description["shapes"].items():
            path, _, tensor_name = name.rpartition(".")
            _resize(model.get_submodule(path), tensor_name, torch.Size(shape), resized)
    except (AttributeError, RuntimeError) as error:  # a path that it does not have; a shape that no tensor can have
        raise MorphError(first_line(error)) from error
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _put_layer(model: nn.Module, path: str, facts: Mapping[str, Any]) -> None:
    """Put a layer of ours at `path`, in place of one of the model's or beside them."""
    kind = str(facts.get("layer"))
    if kind not in LAYERS or not path:
        raise MorphError(f"'{path}' cannot be a layer of kind {kind}")
    if wrong := mismatch(facts, LAYERS[kind], path):
        raise MorphError(wrong)
    present = dict(model.named_modules()).get(path)
    if present is not None and _own_layer(present) == facts:
        return
    settings = {name: facts[name] for name in LAYERS[kind]}
    if kind in INSERTED:
        parent_path, _, name = path.rpartition(".")
        if not isinstance(model.get_submodule(parent_path), nn.Sequential) or not name.isdecimal():
            raise MorphError(f"{path}: layers are inserted into a Sequential only")
        model.set_submodule(path, in_type(INSERTED[kind](model, settings), input_type(model)))
    else:
        model.set_submodule(path, REBUILD[kind](model.get_submodule(path), settings))


def _set_widths(module: nn.Module, path: str, widths: Mapping[str, int], largest: int) -> None:
    """Set widths that `module` has; none is raised above the entries of the `largest` tensor."""
    known = widths_of(module)
    for name, value in widths.items():
        if name not in known or not 0 <= value <= max(largest, known[name]):
            raise MorphError(f"{path}: {name}={value} is no width of this {type(module).__name__}")
        setattr(module, name, value)


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
    norms = [m for m in old.modules() if hasattr(m, "num_features") or hasattr(m, "num_channels")]
    return ZeroBranch(norm=_last(norms, old), **facts)


def _zero_branch_bias(old: nn.Module, facts: dict[str, Any]) -> nn.Module:
    biases = [m.bias for m in old.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    return ZeroBranch(bias=_last(biases, old), **facts)


def _last(found: list[Any], old: nn.Module) -> Any:
    if not found:
        raise MorphError(f"a {type(old).__name__} has nothing that stays when its branch goes")
    return found[-1]


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


ZERO_BRANCH = {"channels": int, "stride": list[int] | None}
# The settings of each kind of layer.
LAYERS: dict[str, dict[str, Any]] = {
    "no_channels": {"stride": list[int]},
    "zero_branch_norm": ZERO_BRANCH,
    "zero_branch_bias": ZERO_BRANCH,
    "zero_branch_zeros": ZERO_BRANCH,
    "gated": {"select": bool, "scatter": bool},
    "grown": {"in_front": bool},
    "inserted_layer": {"kernel": int, "norm": bool},
    "inserted_block": {"kernels": list[int], "norm": bool, "halves": bool, "activation": bool},
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
    if not isinstance(old, torch.Tensor):
        raise MorphError(f"{name} of a {type(module).__name__} is no tensor")
    if old.shape == shape:
        return
    kernel = module.kernel_size if isinstance(module, _ConvNd) and name == "weight" else shape[2:]
    if old.dim() != len(shape) or tuple(shape[2:]) != tuple(kernel):
        raise MorphError(
            f"{name} of a {type(module).__name__} is {tuple(old.shape)}, which no surgery makes {tuple(shape)}"
        )
    new = resized.get(id(old))
    if new is None:
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        resized[id(old)] = new
    setattr(module, name, new)
