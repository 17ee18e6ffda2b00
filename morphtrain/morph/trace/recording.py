"""Record the calls of a model's forward with `torch.fx`."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from morphtrain.errors import first_line
from morphtrain.morph.errors import MorphError
from morphtrain.morph.layers import OWN_LAYERS
from morphtrain.morph.modes import kept_modes
from morphtrain.morph.paths import matches
from morphtrain.morph.trace.chance import Chance, kept_chance
from morphtrain.morph.trace.kinds import MIXING, NORMS, WIDTHS, is_torch_layer
from morphtrain.morph.trace.nodes import owner_path

# Errors of torch's functions on tensors that do not fit.
FAILURES = (RuntimeError, NotImplementedError, ValueError, IndexError)
# What torch.fx may raise: the model is called with proxies instead of tensors.
UNTRACEABLE = (*FAILURES, fx.proxy.TraceError, TypeError, NameError, AttributeError, KeyError, AssertionError)

Reads = dict[tuple[nn.Module, str], None]  # widths of layers that code reads, each once


class Tracer(fx.Tracer):
    """A symbolic trace that does not look into the layers of `morphtrain.morph` or into ignored modules.

    Args:
        ignore: patterns of the paths of modules that are not looked into.
        layers: more modules that are not looked into.
        chance: notes random numbers; `throws` are the paths of the modules whose code draws them.
    """

    def __init__(
        self, ignore: Sequence[str] = (), layers: Collection[nn.Module] = (), chance: Chance | None = None
    ) -> None:
        super().__init__()
        self.ignore, self.layers, self.chance = ignore, layers, chance
        self.throws: list[str] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, OWN_LAYERS) or matches(module_qualified_name, self.ignore)
        # A norm derived from one of torch's may do anything, unless it declares that it treats each channel by itself.
        own = own or (isinstance(m, NORMS) and getattr(m, "per_channel", False))
        own = own or m in self.layers or is_torch_layer(m)
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.note_throws()
        result = super().call_module(m, forward, args, kwargs)
        self.note_throws(self.path_of_module(m))
        return result

    def note_throws(self, path: str = "") -> None:
        """Note the module that is being called, or the one at `path`, if its code drew a random number just now."""
        if self.chance and not self.throws and self.chance.decides():
            self.throws.append(path or next((at for at, _ in reversed(self.module_stack.values())), "the model"))


class _Proxy(fx.Proxy):
    """Records `a += b` as such, where torch.fx records a + b: others see what is written into an operand."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


@dataclass
class Recording:
    """The calls of a model's forward in one mode.

    Args:
        model: the network; `ignore` and `layers` are what was not looked into.
        training: the mode.
        graph: the calls.
        reads: the widths of layers that the code reads as attributes.
    """

    model: nn.Module
    ignore: Sequence[str]
    layers: Collection[nn.Module]
    training: bool
    graph: fx.Graph = field(default_factory=fx.Graph)
    reads: Reads = field(default_factory=dict)

    def source_line(self, n: fx.Node) -> str:
        """Where the model's code calls `n`.

        The model is traced again to find it, because recording the lines in every trace would cost time.
        """
        tracer = Tracer(self.ignore, self.layers)
        tracer.record_stack_traces = True
        with kept_modes(self.model), kept_chance():
            nodes = tracer.trace(self.model.train(self.training)).nodes
        for twin in nodes:
            if twin.name == n.name and twin.stack_trace:
                lines = [line.strip() for line in twin.stack_trace.splitlines()]
                frames = [line for line in lines if line.startswith("File ")]
                inner = [line for line in frames if "/torch/" not in line and __file__ not in line] or frames
                return inner[-1] if inner else "source unknown"
        return "source unknown"


def record(
    model: nn.Module, ignore: Sequence[str], layers: Collection[nn.Module] = (), training: bool = True
) -> Recording:
    """The calls of the model's forward in one mode; modes and random states are left as they are.

    Raises:
        MorphError: naming the line of the model's code that torch.fx cannot trace, or the module whose code decides by
            a random number what it calls.
    """
    recording = Recording(model, ignore, layers, training)
    try:
        with kept_modes(model), kept_chance(), _noted_reads(recording.reads), Chance() as chance:
            model.train(training)
            tracer = Tracer(ignore, layers, chance)
            recording.graph = tracer.trace(model)
            tracer.note_throws("the model")
    except UNTRACEABLE as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__] or frames
        line = f'File "{own[-1].filename}", line {own[-1].lineno}, in {own[-1].name}'
        raise MorphError(f"torch.fx cannot trace {type(model).__name__}: {first_line(error)} ({line})") from error
    if tracer.throws:
        raise MorphError(
            f"cannot follow channels through {tracer.throws[0]}: its forward draws a random number, by which it may "
            "decide what it calls (layer drop?); leave it out by its path in `ignore`"
        )
    return recording


def record_modes(model: nn.Module, ignore: Sequence[str], layers: Collection[nn.Module]) -> list[Recording]:
    """The recording of training mode, and that of evaluation mode if it is another one.

    Raises:
        MorphError: as in `record`; also if the code does not call the same twice.
    """
    training, again = record(model, ignore, layers), record(model, ignore, layers)
    different = first_difference(training.graph, again.graph)
    if different is not None:
        place = owner_path(different) or "the model"
        raise MorphError(
            f"cannot follow channels through {place}: its forward does not call the same every time (a random number, "
            "or a counter that it keeps?); leave it out by its path in `ignore`"
        )
    evaluation = record(model, ignore, layers, training=False)
    training.reads |= evaluation.reads
    return [training] if first_difference(training.graph, evaluation.graph) is None else [training, evaluation]


def first_difference(one: fx.Graph, other: fx.Graph) -> fx.Node | None:
    """The first call of `one` that is not the same in `other`, or its last; None if there is none."""
    mine, theirs = list(one.nodes), list(other.nodes)
    numbers = [{n: i for i, n in enumerate(nodes)} for nodes in (mine, theirs)]
    for a, b in zip(mine, theirs, strict=False):
        if _call(a, numbers[0]) != _call(b, numbers[1]):
            return a
    return mine[-1] if len(mine) != len(theirs) else None


@dataclass(frozen=True)
class _Result:
    """Stands for the result of a call, by the call's number."""

    number: int


def _call(n: fx.Node, numbers: dict[fx.Node, int]) -> tuple[Any, ...]:
    constant = n.op == "get_attr" and str(n.target).startswith("_tensor_constant")  # made anew in each recording
    arguments = fx.node.map_arg((n.args, n.kwargs), lambda a: _Result(numbers[a]))  # type: ignore[arg-type,return-value]
    return n.op, "a constant" if constant else n.target, arguments, owner_path(n)


@contextmanager
def _noted_reads(reads: Reads) -> Iterator[None]:
    """Note which widths of layers are read as attributes; a group count of 1 does not change."""
    kinds = [(kind, name) for kind in (*MIXING, *NORMS, nn.PReLU) for name in WIDTHS]

    def noted(name: str) -> property:
        def read(module: nn.Module) -> Any:
            if name not in vars(module):
                raise AttributeError(name)
            value = vars(module)[name]
            if not (name in ("groups", "num_groups") and value == 1):
                reads[module, name] = None
            return value

        return property(read, lambda module, value: vars(module).__setitem__(name, value))

    for kind, name in kinds:
        setattr(kind, name, noted(name))
    try:
        yield
    finally:
        for kind, name in kinds:
            delattr(kind, name)
