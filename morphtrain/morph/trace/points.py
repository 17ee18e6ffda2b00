"""Where a network can become deeper: in front of which convolutions, and after which modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn

from morphtrain.morph.paths import prefixes
from morphtrain.morph.trace.nodes import SUMS, name_of, owner_path
from morphtrain.morph.trace.traced import Trace

# Results without a negative value: a ReLU leaves them as they are.
NON_NEGATIVE = frozenset(("relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "softmax", "abs", "square"))
NON_NEGATIVE |= frozenset(("ReLU", "ReLU6", "Sigmoid", "Hardsigmoid"))
# Results without a negative value if the first input has none ...
KEEPS_SIGN = frozenset(("Identity", "Dropout", "Dropout2d", "Flatten", "MaxPool2d", "AvgPool2d", "SelectChannels"))
KEEPS_SIGN |= frozenset(("AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "ChannelShuffle", "PadChannels"))
KEEPS_SIGN |= frozenset(("dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "flatten", "view", "reshape"))
KEEPS_SIGN |= frozenset(("contiguous", "transpose", "permute", "chunk", "split", "getitem", "mean", "interpolate"))
# ... and if no input has one.
KEEPS_SIGNS = frozenset(("add", "iadd", "add_", "mul", "cat", "concat", "concatenate", "stack", "maximum"))


@dataclass(frozen=True)
class Point:
    """A place where a block can be inserted: after the module at `path`, on the only way that its output takes.

    Args:
        path: of the module.
        channels: of its output (B, channels, H, W), at the time of the trace.
        non_negative: whether the output has no value below zero, as after a ReLU.
    """

    path: str
    channels: int
    non_negative: bool


class Places(NamedTuple):
    """Where a network can become deeper.

    Args:
        layers: the paths of two-dimensional convolutions that are called once, on an input without negative values.
        blocks: a point after every module that is called once and passes on one tensor (B, C, H, W), by its path.
        ends: of these points the last one in each stage. A stage consists of the sums of the same channels; in a
            network without sums, of the activations of one size.
    """

    layers: list[str]
    blocks: dict[str, Point]
    ends: list[Point]


def find_places(trace: Trace, modules: Mapping[str, nn.Module]) -> Places:
    """The places of a traced network."""
    signs, outputs = _non_negative(trace.nodes, modules), _outputs(trace.nodes)
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
    ends: dict[fx.Node, list[str]] = {}  # node -> the modules whose output it is, outermost first
    for path in blocks:
        ends.setdefault(outputs[path], []).append(path)
    images = [n for n in trace.nodes if len(n.meta.get("shape", ())) == 4]
    sums = [n for n in images if n.op != "call_module" and name_of(n) in SUMS]
    stages: dict[Hashable, Point] = {}
    for n in sums or [n for n in images if _name(n, modules) in NON_NEGATIVE]:
        users = list(n.users)
        end = users[0] if len(users) == 1 and _name(users[0], modules) in NON_NEGATIVE else n
        size = tuple(n.meta["shape"][2:])
        if end in ends:
            whole = [path for path in ends[end] if path in _modules_around(n)] or ends[end]  # that contain the sum
            channels = tuple(trace.roots[trace.labels[n]].flatten().tolist()) if sums else ()
            stages[size, channels] = blocks[whole[-1]]
    return list(stages.values())


def _non_negative(nodes: list[fx.Node], modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The nodes whose results have no value below zero, whatever the weights are."""
    found: set[fx.Node] = set()
    for n in nodes:
        name, inputs = _name(n, modules), n.all_input_nodes
        passed = name in KEEPS_SIGN and bool(inputs) and inputs[0] in found
        combined = name in KEEPS_SIGNS and bool(inputs) and found.issuperset(inputs) and not _has_numbers(n)
        if name in NON_NEGATIVE or passed or combined:
            found.add(n)
    return found


def _outputs(nodes: list[fx.Node]) -> dict[str, fx.Node]:
    """Module path -> the only node in it whose result is used outside; modules that are called once only."""
    calls: dict[str, set[str]] = {}  # path -> keys of its calls
    for n in nodes:
        for key, (path, _) in (n.meta.get("nn_module_stack") or {}).items():
            calls.setdefault(path, set()).add(key)
    inside = {n: _modules_around(n) for n in nodes}
    ends: dict[str, set[fx.Node]] = {}
    for n in nodes:
        for path in inside[n]:
            if any(path not in inside[user] for user in n.users):
                ends.setdefault(path, set()).add(n)
    return {
        path: next(iter(found)) for path, found in ends.items() if len(found) == 1 and len(calls.get(path, ())) <= 1
    }


def _modules_around(n: fx.Node) -> list[str]:
    """The modules that contain a call, outermost first; for the call of a module, that module comes last."""
    return prefixes(owner_path(n))


def _name(n: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    return type(modules[str(n.target)]).__name__ if n.op == "call_module" else name_of(n)


def _has_numbers(n: fx.Node) -> bool:
    """Whether an operand is a number, which may be negative."""
    return any(isinstance(a, (int, float)) for a in n.args if name_of(n) in (*SUMS, "mul"))
