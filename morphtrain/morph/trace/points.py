"""Where a network can become deeper: in front of which convolutions, and after which modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn

from morphtrain.morph.trace.labels import varies
from morphtrain.morph.trace.nodes import SUMS, modules_around, name_of
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
KEEPS_SIGNS = frozenset(("add", "iadd", "add_", "mul", "imul", "cat", "concat", "concatenate", "stack", "maximum"))


@dataclass(frozen=True)
class Point:
    """A place where a block can be inserted: after the module at `path`, on the only way that its output takes.

    Args:
        path: of the module.
        channels: of its output (B, channels, H, W), at the time of the trace.
        non_negative: whether the module is called once and its output has no value below zero, as after a ReLU.
        in_call: whether the module was called by its parent's forward, so that a Sequential that ends with it can
            become longer; code also calls the layers of a ModuleList or Sequential one by one.
    """

    path: str
    channels: int
    non_negative: bool
    in_call: bool


class Places(NamedTuple):
    """Where a network can become deeper.

    Args:
        layers: the paths of two-dimensional convolutions that are called once, on an input without negative values.
        blocks: a point after every module that is called once and passes on one tensor (B, C, H, W), by its path.
        ends: of these points the last one in each stage; after a module that is called several times if the stage has
            no other. A stage consists of the sums of the same channels; in a network without sums, of the activations
            of one size.
    """

    layers: list[str]
    blocks: dict[str, Point]
    ends: list[Point]


def find_places(trace: Trace, modules: Mapping[str, nn.Module]) -> Places:
    """The places of a traced network; only those that training and evaluation mode have alike."""
    places = _places_in(trace.nodes, trace, modules)
    if trace.evaluation == trace.nodes:
        return places
    other = _places_in(trace.evaluation, trace, modules)
    return Places(
        [path for path in places.layers if path in other.layers],
        {path: point for path, point in places.blocks.items() if other.blocks.get(path) == point},
        [point for point in places.ends if point in other.ends],
    )


def _places_in(nodes: list[fx.Node], trace: Trace, modules: Mapping[str, nn.Module]) -> Places:
    signs, outputs = _non_negative(nodes, modules, trace.activations), _outputs(nodes)
    points = {
        path: _point(path, calls, signs)
        for path, calls in outputs.items()
        if path not in trace.odd_calls and all(_is_image(n) and _is_channels_first(n, trace) for n in calls)
    }
    ends = _stage_ends(nodes, trace, modules, points, outputs)
    blocks = {path: point for path, point in points.items() if len(outputs[path]) == 1 or point in ends}
    return Places(_layers(nodes, modules, signs), blocks, ends)


def _point(path: str, calls: Sequence[fx.Node], signs: Container[fx.Node]) -> Point:
    parent = path.rpartition(".")[0]
    in_call = not parent or all(parent in modules_around(n) for n in calls)
    return Point(path, calls[0].meta["shape"][1], len(calls) == 1 and calls[0] in signs, in_call)


def _is_image(n: fx.Node) -> bool:
    return len(n.meta.get("shape", ())) == 4


def _is_channels_first(n: fx.Node, trace: Trace) -> bool:
    """Whether no channels lie elsewhere than in dimension 1, as they do in front of a layer norm."""
    return not any(varies(trace.labels[n], dim) for dim in (0, 2, 3))


def _layers(nodes: list[fx.Node], modules: Mapping[str, nn.Module], signs: set[fx.Node]) -> list[str]:
    called = [n for n in nodes if n.op == "call_module"]
    times = Counter(str(n.target) for n in called)
    convolutions = [n for n in called if isinstance(modules[str(n.target)], nn.Conv2d)]
    return [str(n.target) for n in convolutions if times[str(n.target)] == 1 and n.all_input_nodes[0] in signs]


def _stage_ends(
    nodes: list[fx.Node],
    trace: Trace,
    modules: Mapping[str, nn.Module],
    points: Mapping[str, Point],
    outputs: Mapping[str, Sequence[fx.Node]],
) -> list[Point]:
    ends: dict[fx.Node, list[str]] = {}  # node -> the modules whose output it is, outermost first
    for path in points:
        for n in outputs[path]:
            ends.setdefault(n, []).append(path)
    images = [n for n in nodes if _is_image(n)]
    sums = [n for n in images if n.op != "call_module" and name_of(n) in SUMS]
    stages: dict[Hashable, Point] = {}
    for n in sums or [n for n in images if _name(n, modules, trace.activations) in NON_NEGATIVE]:
        users = list(n.users)
        end = users[0] if len(users) == 1 and _name(users[0], modules) in NON_NEGATIVE else n
        size = tuple(n.meta["shape"][2:])
        if end in ends:
            whole = [path for path in ends[end] if path in modules_around(n)] or ends[end]  # that contain the sum
            channels = tuple(trace.roots[trace.labels[n]].flatten().tolist()) if sums else ()
            point, known = points[whole[-1]], stages.get((size, channels))
            if known is None or len(outputs[known.path]) > 1 or len(outputs[point.path]) == 1:
                stages[size, channels] = point
    return list(stages.values())


def _non_negative(
    nodes: list[fx.Node], modules: Mapping[str, nn.Module], activations: Mapping[nn.Module, str]
) -> set[fx.Node]:
    """The nodes whose results have no value below zero, whatever the weights are."""
    found: set[fx.Node] = set()
    for n in nodes:
        name, inputs = _name(n, modules, activations), n.all_input_nodes
        passed = name in KEEPS_SIGN and bool(inputs) and inputs[0] in found
        combined = name in KEEPS_SIGNS and bool(inputs) and found.issuperset(inputs) and not _has_numbers(n)
        if name in NON_NEGATIVE or passed or combined:
            found.add(n)
    return found


def _outputs(nodes: list[fx.Node]) -> dict[str, list[fx.Node]]:
    """Module path -> of each of its calls the only node whose result is used outside; modules with such calls only."""
    inside = {n: dict(n.meta.get("nn_module_stack") or {}) for n in nodes}  # the calls around, by their keys
    ends: dict[str, dict[str, list[fx.Node]]] = {}
    for n in nodes:
        for key, (path, _) in inside[n].items():
            calls = ends.setdefault(path, {}).setdefault(key, [])
            if any(key not in inside[user] for user in n.users):
                calls.append(n)
    single = {path: calls for path, calls in ends.items() if path and all(len(found) == 1 for found in calls.values())}
    return {path: [n for (n,) in calls.values()] for path, calls in single.items()}


def _name(n: fx.Node, modules: Mapping[str, nn.Module], activations: Mapping[nn.Module, str] = {}) -> str:
    """The name of what a call gives the result of; of a norm with an activation, that of the activation."""
    if n.op != "call_module":
        return name_of(n)
    module = modules[str(n.target)]
    return activations.get(module) or type(module).__name__


def _has_numbers(n: fx.Node) -> bool:
    """Whether an operand is a number, which may be negative."""
    return any(isinstance(a, (int, float)) for a in n.args if name_of(n) in (*SUMS, "mul", "imul"))
