"""Multiply-accumulate operations of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

COUNTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of one forward pass of one sample of `input_shape` (without the batch dimension).

    Convolutions and linear layers count, everything else is free: the field's convention. One pass in evaluation
    mode is run; the model's modes and buffers are left as they are.
    """
    total = 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        weight: Any = module.weight
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            total += inputs[0][0].numel() * math.prod(weight.shape[1:])
        else:
            total += output[0].numel() * math.prod(weight.shape[1:])

    modes = [(module, module.training) for module in model.modules()]
    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, COUNTED)]
    parameter = next(model.parameters())
    sample = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.no_grad():
            model.eval()(sample)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return total
