"""Record the calls of a model's forward with `torch.fx`."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from morphtrain.errors import first_line
from morphtrain.morph.errors import MorphError
from morphtrain.morph.layers import OWN_LAYERS
from morphtrain.morph.paths import matches
from morphtrain.morph.trace.kinds import NORMS

# Errors of torch's functions on tensors that do not fit.
FAILURES = (RuntimeError, NotImplementedError, ValueError, IndexError)


class Tracer(fx.Tracer):
    """A symbolic trace that does not look into the layers of `morphtrain.morph` or into ignored modules."""

    def __init__(self, ignore: Sequence[str] = ()) -> None:
        super().__init__()
        self.ignore = ignore

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, OWN_LAYERS) or matches(module_qualified_name, self.ignore)
        # A norm derived from one of torch's may do anything, unless it declares that it treats each channel by itself.
        own = own or (isinstance(m, NORMS) and getattr(m, "per_channel", False))
        return own or super().is_leaf_module(m, module_qualified_name)


class _Proxy(fx.Proxy):
    """Records `a += b` as such, where torch.fx records a + b: a sum that writes into an operand needs it in full."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


def record(model: nn.Module, ignore: Sequence[str]) -> fx.Graph:
    """The calls of the model's forward.

    Raises:
        MorphError: naming the line of the model's code that torch.fx cannot trace. The model is called with proxies
            instead of tensors, so it may fail with many kinds of errors.
    """
    try:
        return Tracer(ignore).trace(model)
    except (*FAILURES, fx.proxy.TraceError, TypeError, NameError, AttributeError, KeyError, AssertionError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__] or frames
        line = f'File "{own[-1].filename}", line {own[-1].lineno}, in {own[-1].name}'
        raise MorphError(f"torch.fx cannot trace {type(model).__name__}: {first_line(error)} ({line})") from error


def source_line(model: nn.Module, ignore: Sequence[str], n: fx.Node) -> str:
    """Where the model's code calls `n`.

    The model is traced again to find it, because recording the lines in every trace would cost time.
    """
    tracer = Tracer(ignore)
    tracer.record_stack_traces = True
    for twin in tracer.trace(model).nodes:
        if twin.name == n.name and twin.stack_trace:
            lines = [line.strip() for line in twin.stack_trace.splitlines()]
            frames = [line for line in lines if line.startswith("File ")]
            inner = [line for line in frames if "/torch/" not in line] or frames
            return inner[-1] if inner else "source unknown"
    return "source unknown"
