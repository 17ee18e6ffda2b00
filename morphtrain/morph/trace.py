"""Follow every channel of a network from where it is made to where it is used.

`torch.fx` gives the graph; one forward pass of the example input gives the shapes. Beside each activation runs a
label per channel. Where an operation joins two activations their labels are joined; where it moves channels (pad,
concatenate, flatten) the labels move the same way. What is left are *axes*, the dimensions of parameters, each a
list of labels: the channel spaces are read off them in `morphtrain.morph.graph`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import fx, nn
from torch.nn import functional as F

from morphtrain.morph.layers import PadChannels, ZeroBranch

Role = Literal["produces", "consumes", "elementwise"]


class MorphError(ValueError):
    """The network, or the wanted change, is beyond what `morphtrain.morph` can do without a wrong answer."""


@dataclass
class TracedAxis:
    """A dimension of a module's tensors, with the label of the channel behind each of its entries."""

    path: str
    module: nn.Module
    role: Role
    tensors: tuple[tuple[str, int], ...]  # (tensor name, dimension)
    labels: torch.Tensor
    counter: str | None = None  # the module's attribute that holds this axis' length, if there are no tensors


@dataclass
class Trace:
    """What following the channels found: axes in the order of use, joined labels, and the sums of two paths."""

    axes: list[TracedAxis]
    roots: torch.Tensor  # label -> smallest label of its class
    fixed: torch.Tensor  # labels that are the network's own inputs or outputs
    branches: list[BranchSum] = field(default_factory=list)


@dataclass
class BranchSum:
    """A module path whose output is one operand of a sum, and the module that computes that output last."""

    path: str
    last_path: str
    last: nn.Module


@dataclass
class _Channels:
    """Labels of an activation's channels: `labels[i]` belongs to entry i of dimension `dim`."""

    dim: int
    labels: torch.Tensor


class _Tracer(fx.Tracer):
    """A symbolic trace that keeps the layers of `morphtrain.morph` whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (PadChannels, ZeroBranch)) or super().is_leaf_module(m, module_qualified_name)


def trace_channels(model: nn.Module, example_input: torch.Tensor) -> Trace:
    """Trace `model` on `example_input` (with batch dimension); the model, its mode and its buffers are untouched.

    Raises:
        MorphError: naming the operation, the module path and the source line of what cannot be followed.
    """
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise MorphError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
    propagator = _Propagator(model, graph)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no batch statistics, no dropout: the pass below must leave no mark
    try:
        with torch.no_grad():
            propagator.run(example_input)
    finally:
        for module, training in modes:
            module.training = training
    return propagator.result()


class _Propagator(fx.Interpreter):
    """Run the graph on real tensors and carry the channel labels beside them."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.model = model
        self.channels: dict[fx.Node, _Channels] = {}
        self.axes: dict[tuple[int, str], TracedAxis] = {}  # by module and place
        self.joins: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.fixed: list[torch.Tensor] = [torch.zeros(0, dtype=torch.long)]
        self.count = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["rank"] = value.dim()
        if n.op == "placeholder":
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                labels = self.fresh(value.shape[1])
                self.fixed.append(labels)
                self.channels[n] = _Channels(1, labels)
        elif n.op == "output":
            self.fixed.extend(self.channels[a].labels for a in n.all_input_nodes if a in self.channels)
        elif n.op != "get_attr" and isinstance(value, torch.Tensor):
            self.channels[n] = self.follow(n, value)
        return value

    def follow(self, n: fx.Node, value: torch.Tensor) -> _Channels:
        inputs = [a for a in n.all_input_nodes if a in self.channels]
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            rule = next((r for kind, r in MODULE_RULES.items() if isinstance(module, kind)), None)
            if rule is not None and len(inputs) == 1:
                return rule(self, n, module, self.channels[inputs[0]], value)
            self.refuse(n, f"module {type(module).__name__}")
        rule = FUNCTION_RULES.get(n.target)
        if rule is not None and inputs:
            return rule(self, n, inputs, value)
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
        self.refuse(n, f"operation '{name}'")

    # -- what the rules are made of ---------------------------------------------------------------------------

    def fresh(self, size: int) -> torch.Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if a is not b:
            self.joins.append((a, b))

    def axis(
        self,
        n: fx.Node,
        module: nn.Module,
        place: str,
        role: Role,
        tensors: tuple[tuple[str, int], ...],
        labels: torch.Tensor,
        counter: str | None = None,
    ) -> torch.Tensor:
        """Register an axis, or join with it when the module was used before; returns the axis' labels."""
        known = self.axes.get((id(module), place))
        if known is not None:
            self.join(known.labels, labels)
            return known.labels
        present = tuple((t, d) for t, d in tensors if getattr(module, t, None) is not None)
        self.axes[id(module), place] = TracedAxis(str(n.target), module, role, present, labels, counter)
        return labels

    def refuse(self, n: fx.Node, what: str) -> NoReturn:
        raise MorphError(
            f"cannot follow channels through {what} in {owner_path(n) or 'the model'} ({self.source_line(n)})"
        )

    def source_line(self, n: fx.Node) -> str:
        """Where the model's code calls `n`: found by tracing again, since recording it always would cost time."""
        tracer = _Tracer()
        tracer.record_stack_traces = True
        for twin in tracer.trace(self.model).nodes:
            if twin.name == n.name and twin.stack_trace:
                lines = [line.strip() for line in twin.stack_trace.splitlines()]
                frames = [line for line in lines if line.startswith("File ")]
                inner = [line for line in frames if "/torch/" not in line] or frames
                return inner[-1] if inner else "source unknown"
        return "source unknown"

    def result(self) -> Trace:
        roots = _join_labels(self.count, self.joins)
        return Trace(
            axes=list(self.axes.values()),
            roots=roots,
            fixed=roots[torch.cat(self.fixed)].unique(),
            branches=self.branch_sums(),
        )

    def branch_sums(self) -> list[BranchSum]:
        """Module paths that compute one operand of a two-operand sum, and nothing else."""
        found = []
        paths = {n: owner_path(n) for n in self.graph.nodes}
        ancestors: dict[fx.Node, set[fx.Node]] = {}
        for n in self.graph.nodes:
            ancestors[n] = {n}.union(*(ancestors[a] for a in n.all_input_nodes))
            if n.op == "output" or n.target not in SUMS or len(n.all_input_nodes) != 2:
                continue
            for operand, other in (n.all_input_nodes, n.all_input_nodes[::-1]):
                exclusive = ancestors[operand] - ancestors[other]
                path = common_path([paths[e] for e in exclusive])
                if operand.op != "call_module" or not path:
                    continue
                if {e for e in paths if is_within(paths[e], path)} == exclusive:
                    last = str(operand.target)
                    found.append(BranchSum(path, last, self.fetch_attr(last)))
        return found


def owner_path(n: fx.Node) -> str:
    """The path of the module whose code makes this call ("" for the model itself)."""
    stack = n.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def common_path(paths: list[str]) -> str:
    """The deepest module path that contains all of `paths`."""
    if not paths:
        return ""
    split = [p.split(".") for p in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def is_within(path: str, parent: str) -> bool:
    """Whether `path` is the module `parent` or lies inside it."""
    return path == parent or path.startswith(parent + ".")


def _join_labels(count: int, joins: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The smallest label of each label's class: minima spread along the joins until nothing changes."""
    roots = torch.arange(count)
    if not joins:
        return roots
    a = torch.cat([pair[0] for pair in joins])
    b = torch.cat([pair[1] for pair in joins])
    while True:
        low = torch.minimum(roots[a], roots[b])
        new = roots.clone()
        for side in (a, b, roots[a], roots[b]):
            new.scatter_reduce_(0, side, low, "amin")
        new = new[new]
        if torch.equal(new, roots):
            return roots
        roots = new


# -- rules: how each operation moves channels ------------------------------------------------------------------


def _convolution(p: _Propagator, n: fx.Node, m: Any, x: _Channels, value: torch.Tensor) -> _Channels:
    if m.groups == 1:
        p.axis(n, m, "in", "consumes", (("weight", 1),), x.labels)
        out = p.fresh(m.out_channels)
        return _Channels(1, p.axis(n, m, "out", "produces", (("weight", 0), ("bias", 0)), out))
    if m.groups == m.in_channels == m.out_channels:
        tensors = (("weight", 0), ("bias", 0))
        return _Channels(1, p.axis(n, m, "channels", "elementwise", tensors, x.labels))
    p.refuse(n, f"a convolution of {m.groups} groups")


def _linear(p: _Propagator, n: fx.Node, m: Any, x: _Channels, value: torch.Tensor) -> _Channels:
    if x.dim != value.dim() - 1:
        p.refuse(n, f"a linear layer on dimension {value.dim() - 1} when channels are in dimension {x.dim}")
    p.axis(n, m, "in", "consumes", (("weight", 1),), x.labels)
    out = p.fresh(m.out_features)
    return _Channels(x.dim, p.axis(n, m, "out", "produces", (("weight", 0), ("bias", 0)), out))


NORM_TENSORS = (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))


def _batch_norm(p: _Propagator, n: fx.Node, m: Any, x: _Channels, value: torch.Tensor) -> _Channels:
    return _Channels(1, p.axis(n, m, "channels", "elementwise", NORM_TENSORS, x.labels))


def _pad_channels(p: _Propagator, n: fx.Node, m: PadChannels, x: _Channels, value: torch.Tensor) -> _Channels:
    left = p.axis(n, m, "left", "elementwise", (), p.fresh(m.left), counter="left")
    right = p.axis(n, m, "right", "elementwise", (), p.fresh(m.right), counter="right")
    return _Channels(1, torch.cat([left, x.labels, right]))


def _zero_branch(p: _Propagator, n: fx.Node, m: ZeroBranch, x: _Channels, value: torch.Tensor) -> _Channels:
    labels = p.axis(n, m.norm, "channels", "elementwise", NORM_TENSORS, p.fresh(value.shape[1]))
    p.axes[id(m.norm), "channels"].path = f"{n.target}.norm"
    return _Channels(1, labels)


def _unchanged_module(p: _Propagator, n: fx.Node, m: Any, x: _Channels, value: torch.Tensor) -> _Channels:
    if value.dim() <= x.dim or value.shape[x.dim] != len(x.labels):
        p.refuse(n, f"module {type(m).__name__} that changes the channel dimension")
    return x


def _flatten_module(p: _Propagator, n: fx.Node, m: Any, x: _Channels, value: torch.Tensor) -> _Channels:
    return _flattened(p, n, x, value)


def _flatten(p: _Propagator, n: fx.Node, inputs: list[fx.Node], value: torch.Tensor) -> _Channels:
    return _flattened(p, n, p.channels[inputs[0]], value)


def _flattened(p: _Propagator, n: fx.Node, x: _Channels, value: torch.Tensor) -> _Channels:
    """(B, C, H, W) -> (B, C*H*W): a channel becomes H*W neighbouring features."""
    if x.dim != 1 or value.dim() != 2 or value.shape[1] % len(x.labels):
        p.refuse(n, "a reshape other than flattening all but the batch")
    return _Channels(1, x.labels.repeat_interleave(value.shape[1] // len(x.labels)))


def _unchanged(p: _Propagator, n: fx.Node, inputs: list[fx.Node], value: torch.Tensor) -> _Channels:
    x = p.channels[inputs[0]]
    if value.dim() <= x.dim or value.shape[x.dim] != len(x.labels):
        p.refuse(n, f"operation '{n.name}' that changes the channel dimension")
    return x


def _argument(n: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    return n.args[position] if len(n.args) > position else n.kwargs.get(name, default)


def _mean(p: _Propagator, n: fx.Node, inputs: list[fx.Node], value: torch.Tensor) -> _Channels:
    """A mean over spatial dimensions; over all of them (no `dim`), or over the channels, is refused."""
    x = p.channels[inputs[0]]
    dims = _argument(n, 1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    rank = inputs[0].meta["rank"]
    if dims is None or any(d % rank <= x.dim for d in dims):
        p.refuse(n, "a mean over the batch or the channels")
    return x


def _elementwise(p: _Propagator, n: fx.Node, inputs: list[fx.Node], value: torch.Tensor) -> _Channels:
    operands = [p.channels[a] for a in inputs]
    first = operands[0]
    for other in operands[1:]:
        if other.dim != first.dim or len(other.labels) != len(first.labels):
            p.refuse(n, f"operation '{n.name}' of {len(first.labels)} and {len(other.labels)} channels")
        p.join(first.labels, other.labels)
    return first


def _concatenated(p: _Propagator, n: fx.Node, inputs: list[fx.Node], value: torch.Tensor) -> _Channels:
    dim = _argument(n, 1, "dim", 0)
    parts = [p.channels[a] for a in _argument(n, 0, "tensors")]
    if any(part.dim != dim % value.dim() for part in parts):
        p.refuse(n, "a concatenation in another dimension than the channels'")
    return _Channels(parts[0].dim, torch.cat([part.labels for part in parts]))


def _indexed(p: _Propagator, n: fx.Node, inputs: list[fx.Node], value: torch.Tensor) -> _Channels:
    x = p.channels[inputs[0]]
    index = _argument(n, 1, "index")
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) for i in index) or index[x.dim : x.dim + 1] not in ((), (slice(None),)):
        p.refuse(n, "an index other than slices of the spatial dimensions")
    return x


Rule = Callable[..., _Channels]

MODULE_RULES: dict[type | tuple[type, ...], Rule] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _convolution,
    nn.Linear: _linear,
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d): _batch_norm,
    PadChannels: _pad_channels,
    ZeroBranch: _zero_branch,
    nn.Flatten: _flatten_module,
    (
        nn.Identity,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.SiLU,
        nn.GELU,
        nn.Hardswish,
        nn.Dropout,
        nn.Dropout2d,
        nn.MaxPool2d,
        nn.AvgPool2d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool2d,
    ): _unchanged_module,
}

SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")

FUNCTION_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            torch.relu,
            F.relu,
            "relu",
            "relu_",
            F.dropout,
            F.max_pool2d,
            F.avg_pool2d,
            F.adaptive_avg_pool2d,
            "contiguous",
        ),
        _unchanged,
    ),
    **dict.fromkeys((*SUMS, operator.mul, torch.mul), _elementwise),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    torch.cat: _concatenated,
    operator.getitem: _indexed,
}
