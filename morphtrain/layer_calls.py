"""The convolutions and linear layers of a forward pass, seen where they are called, whatever module or code calls them.

    class Count(LayerCalls):
        def call(self, layer, x, weight, bias, *rest):
            self.calls = getattr(self, "calls", 0) + 1
            return layer(x, weight, bias, *rest)

    with Count():
        logits = model(images)

No module is replaced and no tensor renamed: tracing, surgery and checkpoints see the network as it is. Computed
weights (weight normalisation) arrive as the tensors that the layers use. Several modes nest: the one entered last sees
a call first, and what it calls is seen by the ones around it. Nothing is seen in the backward pass, nor while torch.fx
records a network, as growth does: it has proxies instead of tensors. `torch.autocast` acts below all of them: it casts
what they pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Layer = Callable[..., torch.Tensor]

CONVOLUTIONS = frozenset((F.conv1d, F.conv2d, F.conv3d))
TRANSPOSED = frozenset((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d))
LAYERS = CONVOLUTIONS | TRANSPOSED | {F.linear}


class LayerCalls(TorchFunctionMode):
    """A context in which `call` stands in for every convolution, transposed convolution and linear layer."""

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

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
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


def is_traced(types: Iterable[type]) -> bool:
    """Whether a function was called by torch.fx while it records a network: with proxies instead of tensors."""
    return any(issubclass(kind, fx.Proxy) for kind in types)
