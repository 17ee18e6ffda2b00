"""Record the calls of a model's forward with `torch.fx`."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType
from typing import Any

from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from morphtrain.errors import first_line
from morphtrain.morph.errors import MorphError
from morphtrain.morph.layers import OWN_LAYERS
from morphtrain.morph.modes import kept_modes
from morphtrain.morph.paths import matches
from morphtrain.morph.trace.chance import Chance, kept_chance
from morphtrain.morph.trace.kinds import MIXING, NORMS, WIDTHS, is_torch_layer
from morphtrain.morph.trace.nodes import owner_path
from morphtrain.morph.trace.traced import SAMPLES
from morphtrain.morph.trace.values import Evaluator, samples_like

# Errors of torch's functions on tensors that do not fit.
FAILURES = (RuntimeError, NotImplementedError, ValueError, IndexError)
# What torch.fx may raise: the model is called with proxies instead of tensors.
UNTRACEABLE = (*FAILURES, fx.proxy.TraceError, TypeError, NameError, AttributeError, KeyError, AssertionError)

# Other names of arguments that torch takes: those of NumPy.
NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
JOINING = frozenset(("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"))

Reads = dict[tuple[nn.Module, str], None]  # widths of layers that code reads, each once


class Tracer(fx.Tracer):
    """A symbolic trace that does not look into the layers of `morphtrain.morph` or into ignored modules.

    Args:
        ignore: patterns of the paths of modules that are not looked into.
        layers: more modules that are not looked into.
        chance: notes random numbers; `throws` are the paths of the modules whose code draws them.
            `odd_calls` are those of modules that are not called with one argument, as a Sequential is.
        example: the model's inputs, if code may take apart what calls return, or ask for its number of dimensions.
        reads: notes the widths of layers that code reads.
    """

    def __init__(
        self,
        ignore: Sequence[str] = (),
        layers: Collection[nn.Module] = (),
        chance: Chance | None = None,
        example: Sequence[Any] | None = None,
        reads: Reads | None = None,
    ) -> None:
        super().__init__()
        self.ignore, self.layers, self.chance, self.example = ignore, layers, chance, example
        self.reads = {} if reads is None else reads
        self.throws: list[str] = []
        self.odd_calls: set[str] = set()
        self.evaluators: list[Evaluator] = []
        self.evaluating = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> Any:
        """Record a call with its arguments as the rules know them."""
        if kind == "call_method" or isinstance(target, BuiltinFunctionType):
            kwargs = {NAMES.get(name, name): value for name, value in kwargs.items()}
        if kind == "call_method" and target == "dim" and self.example is not None:
            return self.values(args[0])[0].dim()
        if kind == "call_function" and getattr(target, "__name__", "") in JOINING:
            args = tuple(list(a) if isinstance(a, fx.Proxy) and i == 0 else a for i, a in enumerate(args))
            kwargs = {k: list(a) if isinstance(a, fx.Proxy) and k == "tensors" else a for k, a in kwargs.items()}
        return super().create_proxy(kind, target, args, kwargs, *more, **options)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of what a call returned, one by one."""
        return iter([obj[i] for i in range(self.length(obj))])  # type: ignore[index]

    def length(self, obj: fx.Proxy) -> int:
        """How many parts a tuple or list that a call returned has.

        Raises:
            TraceError: if that depends on the number of samples, as it does for a tensor.
        """
        if self.example is None:
            raise fx.proxy.TraceError("the length of a call's result is not known")
        values = self.values(obj)
        if not all(isinstance(value, (tuple, list)) for value in values) or len(set(map(len, values))) > 1:
            raise fx.proxy.TraceError("control flow by the number of samples, or a loop over a tensor")
        return len(values[0])

    def values(self, obj: fx.Proxy) -> list[Any]:
        """What a call returns for two numbers of samples, on tensors without storage."""
        if not self.evaluators:
            numbers = (SAMPLES, SAMPLES + 1)
            batches = [[samples_like(x, number) for x in self.example or ()] for number in numbers]
            self.evaluators = [Evaluator(self.root, self.graph, batch) for batch in batches]
        reads, self.evaluating = dict(self.reads), True
        try:
            with kept_chance(), _disable_current_modes():
                return [evaluator.so_far(obj.node) for evaluator in self.evaluators]
        finally:  # what torch's own code reads, calls or draws is not the model's
            self.evaluating = False
            self.reads.clear()
            self.reads.update(reads)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise NameError(f"{type(mod).__name__} is called, but is not held as a submodule") from None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, OWN_LAYERS) or matches(module_qualified_name, self.ignore)
        # A layer of one's own may do anything, unless it declares that it treats each channel by itself.
        own = own or getattr(m, "per_channel", False) is True
        own = own or m in self.layers or is_torch_layer(m)
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        part = type(m) is nn.Sequential and m not in (
            self.submodule_paths or {}
        )  # self.features[:7], made by the code itself
        if part or self.evaluating:
            return forward(*args, **kwargs)
        if not ((len(args) == 1 and not kwargs) or (not args and set(kwargs) == {"input"})):
            self.odd_calls.add(self.path_of_module(m))
        self.note_throws()
        result = super().call_module(m, forward, args, kwargs)
        self.note_throws(self.path_of_module(m))
        return result

    def note_throws(self, path: str = "") -> None:
        """Note the module that is being called, or the one at `path`, if its code drew a random number just now."""
        if self.chance and not self.throws and self.chance.decides():
            self.throws.append(path or next((at for at, _ in reversed(self.module_stack.values())), "the model"))


class _Proxy(fx.Proxy):
    """Records `a += b` as such, where torch.fx records a + b: others see what is written into an operand.

    Lengths of tuples and numbers of dimensions are known, so they are numbers.
    """

    tracer: Tracer

    def __getattr__(self, k: str) -> Any:
        if k == "ndim" and self.tracer.example is not None:
            return self.tracer.values(self)[0].dim()
        return _Attribute(self, k)

    def __len__(self) -> int:
        length: int = self.tracer.length(self)
        return length

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a call's result, such as its shape."""


@dataclass
class Recording:
    """The calls of a model's forward in one mode.

    Args:
        model: the network; `ignore` and `layers` are what was not looked into.
        training: the mode.
        example: the inputs.
        graph: the calls.
        reads: the widths of layers that the code reads as attributes.
        odd_calls: the paths of modules that are not called with one argument, as a Sequential is.
    """

    model: nn.Module
    ignore: Sequence[str]
    layers: Collection[nn.Module]
    training: bool
    example: Sequence[Any] | None = None
    graph: fx.Graph = field(default_factory=fx.Graph)
    reads: Reads = field(default_factory=dict)
    odd_calls: set[str] = field(default_factory=set)

    def source_line(self, n: fx.Node) -> str:
        """Where the model's code calls `n`.

        The model is traced again to find it, because recording the lines in every trace would cost time.
        """
        tracer = Tracer(self.ignore, self.layers, example=self.example)
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
    model: nn.Module,
    ignore: Sequence[str],
    layers: Collection[nn.Module] = (),
    example: Sequence[Any] | None = None,
    training: bool = True,
) -> Recording:
    """The calls of the model's forward in one mode; modes and random states are left as they are.

    Raises:
        MorphError: naming the line of the model's code that torch.fx cannot trace, or the module whose code decides by
            a random number what it calls.
    """
    recording = Recording(model, ignore, layers, training, example)
    try:
        with kept_modes(model), kept_chance(), _noted_reads(recording.reads), Chance() as chance:
            model.train(training)
            tracer = Tracer(ignore, layers, chance, example, recording.reads)
            recording.graph, recording.odd_calls = tracer.trace(model), tracer.odd_calls
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


def record_modes(
    model: nn.Module, ignore: Sequence[str], layers: Collection[nn.Module], example: Sequence[Any] | None = None
) -> list[Recording]:
    """The recording of training mode, and that of evaluation mode if it is another one.

    Raises:
        MorphError: as in `record`; also if the code does not call the same twice.
    """
    training, again = record(model, ignore, layers, example), record(model, ignore, layers, example)
    different = first_difference(training.graph, again.graph)
    if different is not None:
        place = owner_path(different) or "the model"
        raise MorphError(
            f"cannot follow channels through {place}: its forward does not call the same every time (a random number, "
            "or a counter that it keeps?); leave it out by its path in `ignore`"
        )
    evaluation = record(model, ignore, layers, example, training=False)
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
    constant = n.op == "get_attr" and str(n.target).startswith("_tensor_constant")  # each recording makes its own
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
