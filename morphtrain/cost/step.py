"""The training step whose memory and speed are measured: the same as in the trainer's loop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from morphtrain.layer_calls import seen_again
from morphtrain.morph import Averages, exact, input_type
from morphtrain.morph.formats import format_of


@runtime_checkable
class Format(Protocol):
    """A number format that is more than what `torch.autocast` casts to: a run's precision."""

    def context(self, device_type: str) -> AbstractContextManager[Any]:
        """The context of a forward pass on a device of this type."""

    def update(self, optimizer: Optimizer) -> None:
        """Take a step."""


KEPT = 0.999  # of averages in a step; whatever it is, the step takes as much memory and time

Casts = torch.dtype | Format | None  # what `torch.autocast` casts to, or a format; None for the parameters' own type


def casts_of(precision: Any) -> Casts:
    """How a run's precision computes; of a user's own, what it casts to is all that need be known."""
    return precision if isinstance(precision, Format) else precision.dtype


def backpropagate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: Casts) -> None:
    """Leave the gradients of the cross-entropy of `images` (B, ...) and `labels` (B,) in the parameters."""
    context = _context(precision, images.device.type)
    with context:
        loss = F.cross_entropy(exact(model(images)), labels)
    with seen_again(context):
        loss.backward()


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: Casts = None,
    averages: Averages | None = None,
) -> None:
    """Forward, backward and optimizer step on `images` (B, ...) and `labels` (B,); gradients are None afterwards.

    `averages`, if given, follow the step.
    """
    backpropagate(model, images, labels, precision)
    update(model, optimizer, precision, averages)


def update(model: nn.Module, optimizer: Optimizer, precision: Casts, averages: Averages | None = None) -> None:
    """The optimizer's step, after which gradients are None, and averages that follow it."""
    if isinstance(precision, Format):
        precision.update(optimizer)
    else:
        optimizer.step()
    optimizer.zero_grad()
    if averages is not None:
        averages.update(model, KEPT)


def _context(precision: Casts, device_type: str) -> AbstractContextManager[Any]:
    if isinstance(precision, Format):
        return precision.context(device_type)
    return nullcontext() if precision is None else torch.autocast(device_type, dtype=precision)


def blank_batch(model: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, *input_shape) of zeros where the model is, of its type and format; labels (B,) of the first class."""
    device = next(model.parameters()).device
    images = torch.zeros(batch_size, *input_shape, dtype=input_type(model), device=device)
    if images.dim() == 4 and any(format_of(p) is torch.channels_last for p in model.parameters()):
        images = images.to(memory_format=torch.channels_last)
    return images, torch.zeros(batch_size, dtype=torch.long, device=device)
