"""Calls that write into a tensor that they are given."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from typing import Any

from torch import fx, nn

from morphtrain.morph.trace.kinds import ACTIVATIONS, MIXING, NORMS, POOLING_AND_PADDING
from morphtrain.morph.trace.nodes import name_of

# Layers and functions whose result may be their input, or a view of it.
PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
MAKING = (*MIXING, *NORMS, *POOLING_AND_PADDING, *ACTIVATIONS, nn.LayerNorm, nn.PReLU)
VIEWS = frozenset(
    ("view", "reshape", "flatten", "ravel", "unflatten", "expand", "expand_as", "broadcast_to", "view_as")
)
VIEWS |= frozenset(("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "squeeze", "unsqueeze"))
VIEWS |= frozenset(("narrow", "select", "chunk", "split", "tensor_split", "unbind", "getitem", "contiguous", "detach"))
VIEWS |= frozenset(("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "requires_grad_", "pad"))
VIEWS |= frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"))
VIEWS |= frozenset(("stochastic_depth",))


def writes_outside(members: Container[fx.Node], modules: Mapping[str, nn.Module]) -> bool:
    """Whether some of the calls `members` write into a tensor that others make, so that these see what was written."""
    return any(_is_outside(n, members, modules) for n in members if _writes(n, modules))  # type: ignore[attr-defined]


def _is_outside(n: fx.Node, members: Container[fx.Node], modules: Mapping[str, nn.Module]) -> bool:
    while n in members and n.all_input_nodes and (_writes(n, modules) or _may_pass(n, modules)):
        n = n.all_input_nodes[0]
    return n not in members


def _writes(n: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a call writes into its first argument."""
    if n.op == "call_module":
        return bool(getattr(modules[str(n.target)], "inplace", False))
    name, target = name_of(n), n.target
    if n.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    if n.op != "call_function":
        return False
    if getattr(target, "__module__", "") == "_operator":
        return name.startswith("i") and name not in ("invert", "is_", "index", "indexOf", "inv")
    return name.endswith("_") or _inplace_argument(n)


def _inplace_argument(n: fx.Node) -> bool:
    target: Any = n.target
    try:
        given = inspect.signature(target).bind(*n.args, **n.kwargs).arguments
    except (TypeError, ValueError):  # a function of torch's that is not written in Python
        given = n.kwargs
    return bool(given.get("inplace", False)) or given.get("out") is not None


def _may_pass(n: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if n.op == "call_module":
        module = modules[str(n.target)]
        return isinstance(module, PASSING) or not isinstance(module, MAKING)
    return name_of(n) in VIEWS
