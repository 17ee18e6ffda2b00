"""A whole network in 16 bits, whatever its parameters have: no list of operations says what is cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional as F

from morphtrain.layer_calls import LayerCalls, is_traced, known_as
from morphtrain.precision.autocast import Precision

Norm = Callable[..., torch.Tensor]
NORMS = frozenset((F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm))


class Cast(LayerCalls):
    """Casts what convolutions, linear layers and norms get; what lies between flows as it comes out of them.

    Parameters of 32 bits are cast where they are used, and get gradients of 32 bits. Those of norms are not: what a
    norm computes with them, it computes in 32 bits, and gives in 16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def call(
        self,
        layer: Callable[..., torch.Tensor],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *rest: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        bias = None if bias is None else bias.to(self.dtype)
        return layer(x.to(self.dtype), known_as(weight.to(self.dtype), weight), bias, *rest, **keywords)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in NORMS and not is_traced(types):
            return self._norm(func, *args, **(kwargs or {}))
        if func == torch.prelu and not is_traced(types):
            return _prelu(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _norm(self, norm: Norm, input: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
        x = input.to(self.dtype)
        given = (*rest, *keywords.values())
        wide = any(isinstance(tensor, torch.Tensor) and tensor.dtype is not self.dtype for tensor in given)
        if norm is F.batch_norm or not wide:  # batch norm takes 16 bits with parameters of 32
            return norm(x, *rest, **keywords)
        return norm(x.float(), *rest, **keywords).to(self.dtype)


def _prelu(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """It wants both in one type."""
    return F.prelu(input, weight.to(input.dtype))


class Casting(Precision):
    """Forward and backward pass in 16 bits; what the optimizer and methods see has the type of the parameters.

    Parameters of 32 bits, which is what a run makes, are the masters of those that layers compute with (Micikevicius et
    al. 2018, arXiv 1710.03740, section 3.1). So whatever follows parameters follows the masters.

    Args:
        dtype: float16 or bfloat16.
        others: as in `Precision`.
    """

    dtype: torch.dtype

    def __init__(self, device: torch.device, dtype: torch.dtype, init_scale: float | None = None) -> None:
        super().__init__(device, dtype, init_scale)
        self.cast = Cast(dtype)

    def context(self, device_type: str) -> AbstractContextManager[Any]:
        return self.cast
