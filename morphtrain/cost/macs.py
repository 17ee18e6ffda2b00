"""Multiply-accumulate operations of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from morphtrain.morph import MIXING, TRANSPOSED, input_type, kept_modes


@torch.no_grad()
def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of one forward pass of one sample.

    Convolutions and linear layers count, everything else is free: the field's convention. One pass in evaluation
    mode is run; the model's modes and buffers are left as they are.

    Args:
        input_shape: of one sample, without the batch dimension.
    """
    total = 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        weight: Any = module.weight
        values = inputs[0][0] if isinstance(module, TRANSPOSED) else output[0]
        total += values.numel() * math.prod(weight.shape[1:])

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, MIXING)]
    device = next(model.parameters()).device
    sample = torch.zeros(1, *input_shape, dtype=input_type(model), device=device)
    try:
        with kept_modes(model):
            model.eval()(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return total
