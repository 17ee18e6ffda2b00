"""Layers derived from one of torch's norms that compute the same, optionally followed by an activation."""

from __future__ import annotations

from torch import fx, nn

from morphtrain.morph.modes import kept_attributes, kept_modes
from morphtrain.morph.trace.chance import kept_chance
from morphtrain.morph.trace.kinds import ACTIVATIONS, NORMS, TENSORS, is_torch_layer
from morphtrain.morph.trace.nodes import argument, name_of
from morphtrain.morph.trace.recording import UNTRACEABLE, Tracer
from morphtrain.morph.trace.rules.functions import keeps_channels

# Function -> where its arguments are that must be the norm's own tensors.
FUNCTIONS = {
    "batch_norm": {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4},
    "instance_norm": {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4},
    "group_norm": {"weight": 2, "bias": 3},
}
CHECKS = frozenset(("_assert", "getattr", "dim", "eq", "ne", "ge", "gt"))  # of the input's number of dimensions


def norms_with_activations(model: nn.Module) -> dict[nn.Module, str]:
    """The layers of `model` whose own forward is that of their norm and what torch does to each channel by itself.

    Returns:
        by layer, the name of the last thing that it does (timm's BatchNormAct2d: "ReLU").
    """
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, NORMS) and not is_torch_layer(module) and not getattr(module, "per_channel", False):
            last = {_last_step(module, training) for training in (True, False)}
            name = last.pop()
            if name is not None and not last:
                found[module] = name
    return found


def _last_step(norm: nn.Module, training: bool) -> str | None:
    """The name of the last call in the forward of `norm`; None if it is not that of a norm with an activation."""
    try:
        with kept_modes(norm), kept_attributes(norm), kept_chance():
            nodes = list(Tracer().trace(norm.train(training)).nodes)
    except UNTRACEABLE:
        return None
    steps = [n for n in nodes if n.op != "get_attr" and name_of(n) not in CHECKS]
    if len(steps) < 3 or steps[0].op != "placeholder" or not _is_norm(steps[1], steps[0], norm):
        return None
    chain, output = steps[1:-1], steps[-1]
    passed = all(_keeps_channels(n, norm) and set(n.all_input_nodes) <= set(chain) for n in chain[1:])
    return _name(chain[-1], norm) if passed and output.args == (chain[-1],) else None


def _is_norm(n: fx.Node, x: fx.Node, norm: nn.Module) -> bool:
    """Whether a call is that of torch's function for `norm`, on its input and with its own tensors."""
    tensors = FUNCTIONS.get(name_of(n), {}) if n.op == "call_function" else {}
    group = isinstance(norm, nn.GroupNorm)
    if not tensors or argument(n, 0, "input") is not x or (name_of(n) == "group_norm") != group:
        return False
    if group and argument(n, 1, "num_groups") != norm.num_groups:
        return False
    given = {name: argument(n, position, name) for name, position in tensors.items()}
    own = all(a is None or (a.op == "get_attr" and a.target == name) for name, a in given.items())
    weights = all((given[name] is None) == (getattr(norm, name) is None) for name in ("weight", "bias"))
    return own and weights and {str(a.target) for a in n.all_input_nodes if a is not x} <= TENSORS


def _keeps_channels(n: fx.Node, norm: nn.Module) -> bool:
    if n.op == "call_module":
        module = norm.get_submodule(str(n.target))
        return isinstance(module, ACTIVATIONS) and is_torch_layer(module)
    return n.op != "output" and keeps_channels(n)


def _name(n: fx.Node, norm: nn.Module) -> str:
    return type(norm.get_submodule(str(n.target))).__name__ if n.op == "call_module" else name_of(n)
