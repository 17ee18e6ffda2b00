"""Casting and loss scaling around a training step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from morphtrain.cost.stopwatch import timed

SLOW = 1.2  # times as long as in float32: from there on a user should know
ROUNDS = 4  # of which the fastest counts

log = logging.getLogger(__name__)


class Precision:
    """How a step computes: the type operations are cast to, and the loss scale that goes with it.

    Args:
        device: of the model.
        dtype: None computes in the parameters' own type; otherwise `torch.autocast` picks per operation.
        init_scale: the first loss scale. Dynamic scaling (Micikevicius et al. 2018, arXiv 1710.03740) is on for float16
            and off for all other types, whose range does not need it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None, init_scale: float = 2.0**16) -> None:
        self.device = device
        self.dtype = dtype
        scaling = dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, init_scale=init_scale, enabled=scaling)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Look at the run's model and optimizer once they are made, or cast the parameters in place."""

    def metrics(self) -> Mapping[str, float]:
        """What to record of the epoch that has just ended."""
        return {}

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: torch.Tensor, optimizer: Optimizer, more: bool = False) -> None:
        """Add the gradients of `loss`, and unscale them, so that regularisers and clipping may use them as they are.

        Args:
            more: other losses of the same step follow; gradients stay scaled until the last one.
        """
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled() and not more:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Take the optimizer's step.

        Returns:
            False if it was skipped because the scaled gradients overflowed.
        """
        if not self.scaler.is_enabled():
            optimizer.step()
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)


def warn_if_slow(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Warn, with the measured factor, if `device` is a CPU that is slow in `dtype`; the run goes on."""
    factor = slowdown(device, dtype)
    if factor > SLOW:
        log.warning(
            "precision=%s: a convolution in %s takes %.1f times as long as in float32 on this CPU (measured)",
            name,
            str(dtype).removeprefix("torch."),
            factor,
        )


def slowdown(device: torch.device, dtype: torch.dtype) -> float:
    """How many times as long a convolution in `dtype` takes as in float32, measured on a CPU; 1 on other devices."""
    if device.type != "cpu":
        return 1.0
    return _convolution_seconds(dtype) / _convolution_seconds(torch.float32)


def _convolution_seconds(dtype: torch.dtype) -> float:
    """The fastest of a few forward and backward passes of a typical layer, (16, 32, 16, 16) -> the same shape."""
    x = torch.ones(16, 32, 16, 16, dtype=dtype, requires_grad=True)
    weight = torch.ones(32, 32, 3, 3, dtype=dtype, requires_grad=True)
    return min(timed(lambda: F.conv2d(x, weight, padding=1).sum().backward(), x.device) for _ in range(ROUNDS))
