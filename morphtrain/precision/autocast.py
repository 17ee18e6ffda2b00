"""Casting and loss scaling around a training step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from morphtrain.cost.stopwatch import timed
from morphtrain.errors import UserError
from morphtrain.schema.precision import SMALLEST_SCALE

SLOW = 1.2  # times as long as in float32: from there on a user should know
ROUNDS = 4  # of which the fastest counts

log = logging.getLogger(__name__)


class Precision:
    """How a step computes: the type operations are cast to, and the loss scale that goes with it.

    Args:
        device: of the model.
        dtype: None computes in the parameters' own type; otherwise `torch.autocast` picks per operation.
        init_scale: the first loss scale. Dynamic scaling (Micikevicius et al. 2018, arXiv 1710.03740) is on for float16
            and off for all other types, whose range does not need it. It is doubled after 2000 steps without overflow,
            and halved by an overflow, whose step is skipped. None: the loss is never scaled.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype | None = None, init_scale: float | None = 2.0**16
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.scales = dtype is not None and init_scale is not None
        scaling = self.scales and dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, init_scale=init_scale or 1.0, enabled=scaling)
        self.skipped = 0  # steps, since `metrics` was last asked
        self._unscaled = self._stepping = False  # whether there are unscaled gradients, and a step is being taken

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Look at the run's model and optimizer once they are made, or cast the parameters in place."""
        if self.scaler.is_enabled():
            optimizer.register_step_pre_hook(self._check_step)

    def metrics(self) -> Mapping[str, float]:
        """What to record of the epoch that has just ended: the present loss scale, and how many steps it skipped.

        Nothing for a format that never scales the loss. Steps count from one call to the next.

        Raises:
            UserError: if the scale has been halved until its inverse is infinite, so that no step can follow.
        """
        if self.scaler.is_enabled() and self.scale < SMALLEST_SCALE:
            raise UserError(
                "precision: gradients are infinite or not a number whatever the loss scale, so that every step is "
                "skipped; precision=o0 shows whether those of the network itself are"
            )
        skipped, self.skipped = self.skipped, 0
        return {"loss_scale": self.scale, "skipped_steps": skipped} if self.scales else {}

    @property
    def scale(self) -> float:
        """The present loss scale; 1 where the loss is not scaled."""
        return float(self.scaler.get_scale())

    def context(self, device_type: str) -> AbstractContextManager[Any]:
        """The context of a forward pass on a device of this type, such as "cpu"."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return self.context(self.device.type)

    def backward(self, loss: torch.Tensor, optimizer: Optimizer, more: bool = False) -> None:
        """Add the gradients of `loss`, and unscale them, so that regularisers and clipping may use them as they are.

        Args:
            more: gradients stay scaled: other losses of the same step follow, or `unscale` does.
        """
        if self._unscaled:  # a method wants other gradients than these, which it has not taken a step with
            self.scaler.update()
            self._unscaled = False
        self.scaler.scale(loss).backward()
        if not more:
            self.unscale(optimizer)

    def unscale(self, optimizer: Optimizer) -> None:
        """Unscale the gradients of all losses of a step, once those of all processes are summed.

        So an overflow in one process is one in all of them, which then skip the step together.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
            self._unscaled = True

    def step(self, optimizer: Optimizer) -> bool:
        """Take the optimizer's step.

        Returns:
            False if it was skipped because the scaled gradients overflowed.
        """
        if not self.scaler.is_enabled():
            optimizer.step()
            return True
        taken: list[bool] = []
        # An optimizer that skips inside its kernel could not say that it did.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        handle = optimizer.register_step_post_hook(lambda *step: taken.append(True))
        self._stepping = True
        try:
            self.scaler.step(optimizer)
        finally:
            handle.remove()
            self._stepping = self._unscaled = False
        self.scaler.update()
        self.skipped += not taken
        return bool(taken)

    def end_step(self, optimizer: Optimizer) -> None:
        """Finish a step, once methods have done with the weights what follows it."""

    def update(self, optimizer: Optimizer) -> None:
        """A step without a loss scale: what those of copies are that show what a step costs (`morphtrain.cost`)."""
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)

    def _check_step(self, optimizer: Optimizer, *step: Any) -> None:
        """Raise a `UserError` for a step that passes the loss scale by: nothing would skip it after an overflow."""
        if not self._stepping:
            raise UserError(
                "precision: a method takes a step by itself, which the loss scale of float16 does not allow; "
                "run.precision.step(run.optimizer), or precision=bf16, works"
            )


def chosen_type(name: str, device: torch.device) -> torch.dtype:
    """The type that key `dtype` names; "auto" is float16 on CUDA and bfloat16 elsewhere: CPUs emulate float16."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


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


@functools.cache
def slowdown(device: torch.device, dtype: torch.dtype) -> float:
    """How many times as long a convolution in `dtype` takes as in float32; 1 on other devices than a CPU.

    It is measured once in a process: emulated float16 takes a fifth of a second.
    """
    if device.type != "cpu":
        return 1.0
    return _convolution_seconds(dtype) / _convolution_seconds(torch.float32)


def _convolution_seconds(dtype: torch.dtype) -> float:
    """The fastest of a few forward and backward passes of a typical layer, (16, 32, 16, 16) -> the same shape."""
    x = torch.ones(16, 32, 16, 16, dtype=dtype, requires_grad=True)
    weight = torch.ones(32, 32, 3, 3, dtype=dtype, requires_grad=True)
    return min(timed(lambda: F.conv2d(x, weight, padding=1).sum().backward(), x.device) for _ in range(ROUNDS))
