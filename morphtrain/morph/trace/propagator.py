"""Follow every channel of a network from where it is made to where it is used.

`torch.fx` gives the graph; running it on tensors without storage (the meta device) gives the shapes. Beside each
activation run its labels (`labels.py`), moved and joined by the rules of `layer_rules.py`, `function_rules.py` and
`movement_rules.py`. What is left are *axes*, the dimensions of parameters, each a list of labels: the channel spaces
are read off them in `spaces.py`.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from morphtrain.morph.layers import OWN_LAYERS
from morphtrain.morph.modes import kept_modes
from morphtrain.morph.paths import is_ignored
from morphtrain.morph.trace.labels import Joins, along, fixed, varies
from morphtrain.morph.trace.nodes import describe, first_line, fixed_like, holds_tensors, owner_path, tensors_in
from morphtrain.morph.trace.rules import functions as function_rules
from morphtrain.morph.trace.rules import layers as layer_rules

Role = Literal["produces", "consumes", "elementwise"]
Tensors = tuple[tuple[str, int], ...]  # (tensor name, dimension)
SAMPLES = 2  # of each input, so that a batch is never mistaken for a dimension of size 1
FAILURES = (RuntimeError, NotImplementedError, ValueError, IndexError)  # of torch's functions


class MorphError(ValueError):
    """The network, or the wanted change, is beyond what `morphtrain.morph` can do without a wrong answer."""


@dataclass(eq=False)
class TracedAxis:
    """A dimension of a module's tensors, with the label of the channel behind each of its entries."""

    path: str
    module: nn.Module
    role: Role
    tensors: Tensors
    labels: torch.Tensor
    counter: str | None = None  # the module's attribute that holds this axis' length


@dataclass(eq=False)
class TracedPick:
    """A module whose `index` says which entries of the axis `source` stand in the axis `picked`."""

    module: nn.Module
    source: TracedAxis
    picked: TracedAxis


@dataclass
class Trace:
    """What following the channels found."""

    nodes: list[fx.Node]  # in the order of execution; `meta["shape"]` of those that are tensors
    axes: list[TracedAxis]  # in the order of use
    picks: list[TracedPick]
    labels: dict[fx.Node, Any]  # of tensors; of tuples of tensors, tuples of labels
    roots: torch.Tensor  # label -> smallest label of its class
    shared: dict[tuple[int, str], list[tuple[nn.Module, str]]]  # (id of module, tensor name) -> its other names


def trace_channels(model: nn.Module, example_input: Any, ignore: Sequence[str] = ()) -> Trace:
    """Trace `model` on `example_input`; the model, its mode, its buffers and the random state are untouched.

    Args:
        example_input: a tensor with a batch dimension, or a sequence of such for a model of several inputs.
        ignore: patterns (as of `fnmatch`) of module paths not to look into: they keep every shape they have, and so
            do their inputs and outputs.

    Raises:
        MorphError: naming the operation, the module path and the source line of what cannot be followed.
    """
    attributes = set(vars(model))
    try:
        with kept_modes(model), torch.no_grad():
            model.train()  # a forward that asks for the mode: training may use layers that evaluation does not
            propagator = Propagator(model, _fx_graph(model, ignore), ignore)
            model.eval()  # no batch statistics: a norm refuses to train on one value per channel
            inputs = example_input if isinstance(example_input, (tuple, list)) else (example_input,)
            propagator.run(*map(_samples, inputs))
    finally:
        for name in set(vars(model)) - attributes:  # torch.fx leaves tensors that the code makes
            delattr(model, name)
    return propagator.result()


def _fx_graph(model: nn.Module, ignore: Sequence[str]) -> fx.Graph:
    """The recorded calls of the model's forward. What that makes of the stand-ins it is called with may fail anyhow."""
    try:
        return Tracer(ignore).trace(model)
    except (*FAILURES, fx.proxy.TraceError, TypeError, NameError, AttributeError, KeyError, AssertionError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__] or frames
        line = f'File "{own[-1].filename}", line {own[-1].lineno}, in {own[-1].name}'
        raise MorphError(f"torch.fx cannot trace {type(model).__name__}: {first_line(error)} ({line})") from error


def _samples(x: Any) -> Any:
    """Shapes suffice."""
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty((SAMPLES, *x.shape[1:]) if x.dim() else (), dtype=x.dtype, device="meta")


class _Proxy(fx.Proxy):
    """torch.fx records `a += b` as a + b; whether a sum writes into its operand matters when the operand goes."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class Tracer(fx.Tracer):
    """A symbolic trace that looks neither into the layers of `morphtrain.morph` nor into ignored modules."""

    def __init__(self, ignore: Sequence[str] = ()) -> None:
        super().__init__()
        self.ignore = ignore

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, OWN_LAYERS) or is_ignored(module_qualified_name, self.ignore)
        # A norm derived from one of torch's may do anything, unless it says that it treats each channel by itself.
        own = own or (isinstance(m, layer_rules.NORMS) and getattr(m, "per_channel", False))
        return own or super().is_leaf_module(m, module_qualified_name)


class Propagator(fx.Interpreter):
    """Run the graph on tensors without storage and carry the channel labels beside them."""

    def __init__(self, model: nn.Module, graph: fx.Graph, ignore: Sequence[str]) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # our messages are complete
        self.model = model
        self.ignore = ignore
        self.labels: dict[fx.Node, Any] = {}  # of tensors; of tuples of tensors, tuples of labels
        self.widths: set[fx.Node] = set()  # numbers that depend on how many channels something has
        self.joins = Joins()
        self.axes: dict[tuple[int, str], TracedAxis] = {}  # by module and place
        self.picks: dict[int, TracedPick] = {}  # by module
        self.tensor_axes: dict[tuple[int, int], TracedAxis] = {}  # by tensor and dimension
        self.places = places(model)

    # -- execution -------------------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and not is_ignored(str(n.target), self.ignore):
            module = self.submodules[str(n.target)]
            if parametrize.is_parametrized(module) or isinstance(vars(module).get("weight"), torch.Tensor):
                self.refuse(n, f"module {type(module).__name__} with a weight that is computed (weight norm?)")
        try:
            if n.op == "call_module":
                value = super().run_node(n)
            else:
                with torch.device("meta"):  # for tensors that the code makes itself
                    value = super().run_node(n)
        except FAILURES as error:
            self.refuse(n, f"{describe(n)}, which fails on the example input: {first_line(error)}")
        if isinstance(value, torch.Tensor):
            n.meta["shape"] = value.shape
        if n.op == "placeholder":
            self.labels[n] = fixed(value.dim()) if isinstance(value, torch.Tensor) else ()
        elif n.op == "output":
            self.keep_inputs(n)
        elif n.op == "get_attr":
            if isinstance(value, torch.Tensor):
                self.labels[n] = self.parameter_labels(n, value)
        elif holds_tensors(value):
            self.labels[n] = self.follow(n, value)
        else:
            function_rules.number(self, n, value)
        return value

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.submodules[target]
        if isinstance(module, layer_rules.KEEP_SHAPE) and args:
            return args[0]  # the meta device takes long over norms
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        plain = [(m, k, v) for m in module.modules() for k, v in vars(m).items() if isinstance(v, torch.Tensor)]
        try:
            return functional_call(module, meta, args, kwargs)
        finally:
            for owner, name, tensor in plain:  # what hooks compute anew before every call, as old weight norm does
                vars(owner)[name] = tensor

    def follow(self, n: fx.Node, value: Any) -> Any:
        """The labels of a call's result."""
        if n.op == "call_module" and is_ignored(str(n.target), self.ignore):
            self.keep_inputs(n)
            return fixed_like(value)
        if all(map(self.is_fixed, n.all_input_nodes)) and not self.has_weights(n):
            return fixed_like(value)
        if n.op == "call_module":
            return layer_rules.follow(self, n, self.submodules[str(n.target)], value)
        return function_rules.follow(self, n, value)

    # -- what the rules are made of ---------------------------------------------------------------------------

    def shape(self, n: fx.Node) -> torch.Size:
        shape: torch.Size = self.env[n].shape
        return shape

    def is_width(self, n: fx.Node) -> bool:
        """Whether a number, or a shape, depends on how many channels something has."""
        sized, dims = n.meta.get("dims of", (None, ()))
        return n in self.widths or any(self.has_channels(sized, dim) for dim in dims)

    def has_channels(self, n: Any, dim: int) -> bool:
        """Whether channels lie in dimension `dim` of an activation; of a single one nobody knows where it lies."""
        labels = self.labels.get(n)
        if not isinstance(labels, torch.Tensor):
            return False
        return varies(labels, dim) or (self.shape(n)[dim] == 1 and bool(labels.any()))

    def is_fixed(self, n: fx.Node) -> bool:
        return not self.is_width(n) and all(not bool(t.any()) for t in tensors_in(self.labels.get(n)))

    def has_weights(self, n: fx.Node) -> bool:
        """Whether a call brings parameters, whose own channels may change although its input's may not."""
        if n.op == "call_module":
            module = self.submodules[str(n.target)]
            return isinstance(module, OWN_LAYERS) or next(module.parameters(), None) is not None
        return any(a.op == "get_attr" for a in n.all_input_nodes)

    def keep_inputs(self, n: fx.Node) -> None:
        """The channels of all that a call is given cannot change."""
        for a in n.all_input_nodes:
            for labels in tensors_in(self.labels.get(a)):
                self.joins.keep(labels)

    def keep_varying(self, node: fx.Node, dims: Iterable[int]) -> bool:
        """Keep the channels of `node` if they lie in one of `dims`; whether they do."""
        mixes = any(self.has_channels(node, dim) for dim in dims)
        if mixes:
            self.joins.keep(self.labels[node])
        return mixes

    def concrete(self, argument: Any) -> Any:
        """An argument of a call, with the values of the nodes in it."""
        return fx.node.map_arg(argument, lambda a: self.env[a])

    def line(self, n: fx.Node, node: fx.Node, dim: int) -> torch.Tensor:
        """(N,): the labels of activation `node` along `dim`; refused if they depend on another dimension too."""
        labels, shape = self.labels[node], self.shape(node)
        dim %= len(shape)
        if labels.numel() != labels.shape[dim]:
            self.refuse(n, f"{describe(n)}: channels are not in dimension {dim} (alone)")
        return labels.flatten().expand(shape[dim])

    def axis(
        self,
        path: str,
        module: nn.Module,
        place: str,
        role: Role,
        tensors: Tensors,
        labels: torch.Tensor,
        counter: str | None = None,
    ) -> torch.Tensor:
        """Register an axis, or join with it when the module was used before; returns the axis' labels.

        A tensor that several modules share is registered once, with the first of them.
        """
        known = self.axes.get((id(module), place))
        if known is not None:
            self.joins.join(known.labels, labels)
            return known.labels
        own = []
        for name, dim in tensors:
            tensor = getattr(module, name, None)
            if tensor is None:
                continue
            first = self.tensor_axes.get((id(tensor), dim))
            if first is not None:
                self.joins.join(first.labels, labels)
            else:
                own.append((name, dim))
            if any(is_ignored(p, self.ignore) for p, _, _ in self.places.get(id(tensor), ())):
                self.joins.keep(labels)
        axis = TracedAxis(path, module, role, tuple(own), labels, counter)
        self.axes[id(module), place] = axis
        for name, dim in own:
            self.tensor_axes[id(getattr(module, name)), dim] = axis
        return labels

    def pick(self, n: fx.Node, module: nn.Module, source: torch.Tensor, picked: torch.Tensor) -> None:
        """Register a module that picks entries by an index."""
        path = str(n.target)
        counter = "width" if hasattr(module, "width") else None
        self.axis(path, module, "source", "elementwise", (), source, counter)
        self.axis(path, module, "picked", "elementwise", (), picked)
        self.picks[id(module)] = TracedPick(module, self.axes[id(module), "source"], self.axes[id(module), "picked"])

    def parameter_labels(self, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """Of a parameter or buffer that code uses by itself: its channels, if it is a vector; else it is fixed."""
        path, _, name = str(n.target).rpartition(".")
        owner = self.model.get_submodule(path)
        long = [d for d, size in enumerate(value.shape) if size > 1]
        if len(long) != 1 or (name not in owner._parameters and name not in owner._buffers):
            return fixed(value.dim())
        labels = self.joins.fresh(value.shape[long[0]])
        labels = self.axis(str(n.target), owner, name, "elementwise", ((name, long[0]),), labels)
        return along(labels, long[0], value.dim())

    def refuse(self, n: fx.Node, what: str) -> NoReturn:
        raise MorphError(
            f"cannot follow channels through {what} in {owner_path(n) or 'the model'} ({self.source_line(n)})"
        )

    def source_line(self, n: fx.Node) -> str:
        """Where the model's code calls `n`: found by tracing again, since recording it always would cost time."""
        tracer = Tracer(self.ignore)
        tracer.record_stack_traces = True
        for twin in tracer.trace(self.model).nodes:
            if twin.name == n.name and twin.stack_trace:
                lines = [line.strip() for line in twin.stack_trace.splitlines()]
                frames = [line for line in lines if line.startswith("File ")]
                inner = [line for line in frames if "/torch/" not in line] or frames
                return inner[-1] if inner else "source unknown"
        return "source unknown"

    def result(self) -> Trace:
        several = {key: names for key, names in self.places.items() if len(names) > 1}
        shared = {
            (id(module), name): [(m, other) for _, m, other in names if (m, other) != (module, name)]
            for names in several.values()
            for _, module, name in names
        }
        return Trace(
            nodes=list(self.graph.nodes),
            labels=self.labels,
            axes=list(self.axes.values()),
            picks=list(self.picks.values()),
            roots=self.joins.roots(),
            shared=shared,
        )


def places(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """id of a parameter or buffer -> every (module path, module, name) it has."""
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append((path, module, name))
    return found
