"""What a pass or a recording may change in a model, restored afterwards: its mode, buffers and attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into its present mode when the block ends, whatever the block does."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the values of all buffers back when the block ends."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Remove the attributes that `model` gets until the block ends: torch.fx stores tensors of the code on it."""
    attributes = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - attributes:
            delattr(model, name)
