"""Where a network can become deeper: in front of which convolutions, and behind which modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn

from morphtrain.morph.paths import prefixes
from morphtrain.morph.trace.nodes import name_of, owner_path
from morphtrain.morph.trace.propagator import Trace

# Their results are not negative, and stay as they are if taken for an input of relu.
NON_NEGATIVE = frozenset(("relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "softmax", "abs", "square"))
NON_NEGATIVE |= frozenset(("ReLU", "ReLU6", "Sigmoid", "Hardsigmoid"))
# They make no negative value of values that are none ...
KEEPS_SIGN = frozenset(("Identity", "Dropout", "Dropout2d", "Flatten", "MaxPool2d", "AvgPool2d", "SelectChannels"))
KEEPS_SIGN |= frozenset(("AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "ChannelShuffle", "PadChannels"))
KEEPS_SIGN |= frozenset(("dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "flatten", "view", "reshape"))
KEEPS_SIGN |= frozenset(("contiguous", "transpose", "permute", "chunk", "split", "getitem", "mean", "interpolate"))
# ... and these of several such.
KEEPS_SIGNS = frozenset(("add", "iadd", "add_", "mul", "cat", "concat", "concatenate", "stack", "maximum"))


@dataclass(frozen=True)
class Point:
    """Behind the module at `path`: the only way its output goes.

    Args:
        channels: of the output, (B, channels, H, W), when it was traced.
        non_negative: whether no value of it is below zero, as behind a ReLU.
    """

    path: str
    channels: int
    non_negative: bool


class Places(NamedTuple):
    """Where a network can become deeper.

    Args:
        layers: two-dimensional convolutions, called once, whose input is not negative.
        blocks: every module, called once, that gives one (B, C, H, W) tensor to what is behind it, by its path.
        ends: of these the last of every stage. A stage is what sums of the same channels make; in a network without
            sums, what activations of one size make.
    """

    layers: list[str]
    blocks: dict[str, Point]
    ends: list[Point]


def find_places(trace: Trace, modules: Mapping[str, nn.Module]) -> Places:
    """The places of a traced network."""
    signs, outputs = non_negative(trace.nodes, modules), _outputs(trace.nodes)
    blocks = {
        path: Point(path, node.meta["shape"][1], node in signs)
        for path, node in outputs.items()
        if len(node.meta.get("shape", ())) == 4
    }
    return Places(_layers(trace.nodes, modules, signs), blocks, _stage_ends(trace, modules, blocks, outputs))


def _layers(nodes: list[fx.Node], modules: Mapping[str, nn.Module], signs: set[fx.Node]) -> list[str]:
    called = [n for n in nodes if n.op == "call_module"]
    times = Counter(str(n.target) for n in called)
    convolutions = [n for n in called if isinstance(modules[str(n.target)], nn.Conv2d)]
    return [str(n.target) for n in convolutions if times[str(n.target)] == 1 and n.all_input_nodes[0] in signs]


def _stage_ends(
    trace: Trace, modules: Mapping[str, nn.Module], blocks: Mapping[str, Point], outputs: Mapping[str, fx.Node]
) -> list[Point]:
    ends: dict[fx.Node, list[str]] = {}  # node -> the modules whose output it is, from the outside in
    for path in blocks:
        ends.setdefault(outputs[path], []).append(path)
    images = [n for n in trace.nodes if len(n.meta.get("shape", ())) == 4]
    sums = [n for n in images if n.op != "call_module" and name_of(n) in ("add", "iadd", "add_")]
    stages: dict[Hashable, Point] = {}
    for n in sums or [n for n in images if _name(n, modules) in NON_NEGATIVE]:
        users = list(n.users)
        end = users[0] if len(users) == 1 and _name(users[0], modules) in NON_NEGATIVE else n
        size = tuple(n.meta["shape"][2:])
        if end in ends:
            whole = [path for path in ends[end] if path in _modules_of(n)] or ends[end]  # the sum is part of it
            channels = tuple(trace.roots[trace.labels[n]].flatten().tolist()) if sums else ()
            stages[size, channels] = blocks[whole[-1]]
    return list(stages.values())


def non_negative(nodes: list[fx.Node], modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The nodes whose results hold no value below zero, whatever the weights are."""
    found: set[fx.Node] = set()
    for n in nodes:
        name, inputs = _name(n, modules), n.all_input_nodes
        passed = name in KEEPS_SIGN and bool(inputs) and inputs[0] in found
        combined = name in KEEPS_SIGNS and bool(inputs) and found.issuperset(inputs) and not _has_numbers(n)
        if name in NON_NEGATIVE or passed or combined:
            found.add(n)
    return found


def _outputs(nodes: list[fx.Node]) -> dict[str, fx.Node]:
    """The one node of each module whose result is used outside; not of modules that are called several times."""
    calls: dict[str, set[str]] = {}  # path -> keys of its calls
    for n in nodes:
        for key, (path, _) in (n.meta.get("nn_module_stack") or {}).items():
            calls.setdefault(path, set()).add(key)
    inside = {n: _modules_of(n) for n in nodes}
    ends: dict[str, set[fx.Node]] = {}
    for n in nodes:
        for path in inside[n]:
            if any(path not in inside[user] for user in n.users):
                ends.setdefault(path, set()).add(n)
    return {
        path: next(iter(found)) for path, found in ends.items() if len(found) == 1 and len(calls.get(path, ())) <= 1
    }


def _modules_of(n: fx.Node) -> list[str]:
    """The modules a call is in, from the outside in; of a module's own call that module is the last."""
    return prefixes(owner_path(n))


def _name(n: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    return type(modules[str(n.target)]).__name__ if n.op == "call_module" else name_of(n)


def _has_numbers(n: fx.Node) -> bool:
    """Whether a number is an operand, which may be negative."""
    return any(isinstance(a, (int, float)) for a in n.args if name_of(n) in ("add", "iadd", "add_", "mul"))
