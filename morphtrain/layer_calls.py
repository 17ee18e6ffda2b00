"""The convolutions and linear layers of a forward pass, seen where they are called, whatever module or code calls them.

    class Count(LayerCalls):
        def call(self, layer, x, weight, bias, *rest):
            self.calls = getattr(self, "calls", 0) + 1
            return layer(x, weight, bias, *rest)

    with Count():
        logits = model(images)

No module is replaced and no tensor renamed: tracing, surgery and checkpoints see the network as it is. Computed
weights (weight normalisation) arrive as the tensors that the layers use. Several modes nest: the one entered last sees
a call first, and what it calls is seen by the ones around it. Nothing is seen while torch.fx records a network, as
growth does: it has proxies instead of tensors. `torch.autocast` acts below all of them: it casts what they pass on.

A backward pass sees none either, unless the network computes layers again in it (`torch.utils.checkpoint`, reversible
blocks), which then have to be what they were:

    with seen_again(count):
        loss.backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Layer = Callable[..., torch.Tensor]

CONVOLUTIONS = frozenset((F.conv1d, F.conv2d, F.conv3d))
TRANSPOSED = frozenset((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d))
LAYERS = CONVOLUTIONS | TRANSPOSED | {F.linear}
BACKWARD = (torch.Tensor.backward, torch.autograd.backward)


class LayerCalls(TorchFunctionMode):
    """A context in which `call` stands in for every convolution, transposed convolution and linear layer.

    Attributes:
        is_again: whether what is seen is computed again, in a backward pass.
    """

    is_again = False

    def call(
        self,
        layer: Layer,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *rest: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        """What the layer gives; `layer(x, weight, bias, *rest, **keywords)` is what it would give by itself.

        Args:
            layer: one of `LAYERS`.
            rest, keywords: a convolution's stride, padding and so on.
        """
        raise NotImplementedError

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context in which layers are seen that a backward pass computes again; `is_again` is true meanwhile."""
        self.is_again = True
        try:
            with self._seeing():
                yield
        finally:
            self.is_again = False

    @contextmanager
    def _seeing(self) -> Iterator[None]:
        TorchFunctionMode.__enter__(self)  # that of a subclass may begin a forward pass
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in BACKWARD and self.is_again:  # also that within another one
            with self._seeing():  # a mode is off while it is told of a function, and of all that this calls
                return _backward(*args, **(kwargs or {}))
        if func not in LAYERS or is_traced(types):
            return func(*args, **(kwargs or {}))
        return _called(self.call, func, *args, **(kwargs or {}))


def _called(
    call: Callable[..., torch.Tensor],
    layer: Layer,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *rest: Any,
    **keywords: Any,
) -> torch.Tensor:
    """Give the arguments of a layer their places, however they were given."""
    return call(layer, input, weight, bias, *rest, **keywords)


def _backward(
    tensors: Any,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
    grad_tensors: Any = None,
) -> None:
    """`torch.autograd.backward`, of which no mode is told: they are told of tensors, and not of edges of a graph."""
    outputs = _several(tensors)
    gradients = grad_tensors if gradient is None else gradient  # a tensor's own `backward` calls them otherwise
    given = [None] * len(outputs) if gradients is None else _several(gradients)
    grads = [
        torch.ones_like(output) if grad is None and isinstance(output, torch.Tensor) else grad
        for output, grad in zip(outputs, given, strict=True)
    ]
    leaves = None if inputs is None else [_edge(leaf) for leaf in _several(inputs)]
    torch.autograd.backward([_edge(output) for output in outputs], grads, retain_graph, create_graph, inputs=leaves)


def _several(given: Any) -> list[Any]:
    return [given] if isinstance(given, (torch.Tensor, GradientEdge)) else list(given)


def _edge(tensor: Any) -> GradientEdge:
    return get_gradient_edge(tensor) if isinstance(tensor, torch.Tensor) else tensor


def known_as(computed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A weight that a mode has computed from another one, and which is known by that where no graph says it.

    `source` is the other way round.
    """
    if not torch.is_grad_enabled() and computed is not weight:
        computed._computed_from = weight  # type: ignore[attr-defined]
    return computed


def source(weight: torch.Tensor) -> torch.Tensor:
    """The weight that modes have computed this one from without a graph; by default itself."""
    while (found := getattr(weight, "_computed_from", None)) is not None:
        weight = found
    return weight


@contextmanager
def seen_again(*contexts: object) -> Iterator[None]:
    """The context of a backward pass: those of a forward pass's contexts that see layers see what it computes again."""
    with ExitStack() as stack:
        for context in contexts:
            if isinstance(context, LayerCalls):
                stack.enter_context(context.again())
        yield


def is_traced(types: Iterable[type]) -> bool:
    """Whether a function was called by torch.fx while it records a network: with proxies instead of tensors."""
    return any(issubclass(kind, fx.Proxy) for kind in types)
