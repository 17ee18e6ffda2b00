"""The calls of a network's layers in a trace: the shapes that a layer works on, and the norms before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from morphtrain.morph.layers import NoChannels, ZeroBranch
from morphtrain.morph.trace.kinds import MIXING, NORMS
from morphtrain.morph.trace.nodes import name_of

PRODUCTS = frozenset(("mul", "imul", "mul_", "multiply"))
# Functions and layers whose result for a zero is not zero.
LIFTING = frozenset(("sigmoid", "hardsigmoid", "logsigmoid", "softplus", "exp", "cos", "eq", "le", "ge", "pow", "rsub"))
LIFTING |= {"softmax", "log_softmax", "logsoftmax", "softmin", "softmax2d", "reciprocal", "rsqrt", "log"}
LIVE, CONSTANT, ZERO = 0, 1, 2  # what the channels of a value are if all norms before it put out zeros


class Call(NamedTuple):
    """One call of a layer.

    Args:
        path: of the layer.
        input_shape, output_shape: for `SAMPLES` samples, with the numbers of channels at the time of the trace.
        after_norms: whether a norm with a weight lies between every channel of the input and the layers that made it.
            If these norms put out zeros, the channel is a constant.
        norm: the path of the norm that is the only user of the output; "" if there is no such norm.
    """

    path: str
    input_shape: torch.Size
    output_shape: torch.Size
    after_norms: bool
    norm: str


def layer_calls(
    nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module], activations: Mapping[nn.Module, str]
) -> list[Call]:
    """Every call of a module that takes one tensor and gives one tensor, in the order of execution.

    Args:
        activations: what comes last in layers that are a norm with an activation, by its name.
    """
    levels: dict[fx.Node, int] = {}
    calls = []
    for n in nodes:
        levels[n] = _level(n, modules, activations, [levels[a] for a in n.all_input_nodes])
        inputs = [a for a in n.all_input_nodes if "shape" in a.meta]
        if n.op == "call_module" and len(inputs) == 1 and "shape" in n.meta:
            (x,) = inputs
            shapes = (x.meta["shape"], n.meta["shape"])
            calls.append(Call(str(n.target), *shapes, levels[x] >= CONSTANT, _norm_after(n, modules)))
    return calls


def _level(
    n: fx.Node, modules: Mapping[str, nn.Module], activations: Mapping[nn.Module, str], inputs: Sequence[int]
) -> int:
    """LIVE, CONSTANT or ZERO: what the channels of a value are if the norms put out zeros."""
    if n.op in ("placeholder", "get_attr"):
        return LIVE if n.op == "placeholder" else CONSTANT
    module: Any = modules[str(n.target)] if n.op == "call_module" else None
    if isinstance(module, (*NORMS, ZeroBranch, NoChannels)) and getattr(module, "weight", True) is not None:
        return CONSTANT if activations.get(module, "").lower() in LIFTING else ZERO
    name = type(module).__name__.lower() if module is not None else name_of(n)
    mixes = not _is_depthwise(module) if isinstance(module, MIXING) else name.startswith(("conv", "linear"))
    if mixes:
        return LIVE
    if name in PRODUCTS and ZERO in inputs:
        return ZERO
    return min([*inputs, CONSTANT if name in LIFTING or not inputs else ZERO])


def _is_depthwise(module: Any) -> bool:
    return 1 < getattr(module, "groups", 1) == module.in_channels


def _norm_after(n: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    users = list(n.users)
    alone = len(users) == 1 and users[0].op == "call_module"
    return str(users[0].target) if alone and isinstance(modules[str(users[0].target)], NORMS) else ""
