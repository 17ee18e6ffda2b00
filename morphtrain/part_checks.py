"""Does a user's own part do what its contract says? Tried when a run is built, not found out an epoch later.

Each function raises a `UserError` that begins with `name`, the config key and its value.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch.optim import Optimizer

from morphtrain.contracts import Batch, Data, Loss, Schedule
from morphtrain.errors import UserError, first_line


def check_data(name: str, data: Data) -> None:
    """Look at a batch of the training set and at one of the held-out set."""
    if min(len(data.train), len(data.val)) < 1:
        raise UserError(f"{name}: has {len(data.train)} images for training and {len(data.val)} held out; 1 or more")
    batches = {"train_batches": lambda: data.train_batches(2, torch.Generator().manual_seed(0))}
    for method, make in {**batches, "val_batches": data.val_batches}.items():
        images, labels = _tried(f"{name}: {method}", _first, make)
        wanted, found = (len(labels), *data.input_shape), tuple(images.shape)
        if found != wanted or not images.is_floating_point():
            kind = str(images.dtype).removeprefix("torch.")
            raise UserError(f"{name}: {method} gives images {found} of {kind}; float32 of {wanted} are needed")
        if labels.dtype != torch.long or labels.dim() != 1:
            kind = str(labels.dtype).removeprefix("torch.")
            raise UserError(f"{name}: {method} gives labels {tuple(labels.shape)} of {kind}; int64 of (B,) are needed")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= data.num_classes:
            raise UserError(f"{name}: {method} gives labels {low} to {high}; num_classes={data.num_classes} needs less")


def check_loss(name: str, loss: Loss, num_classes: int) -> None:
    """Call it with blank logits of two images."""
    logits = torch.zeros(2, num_classes, requires_grad=True)
    value = _tried(f"{name}: called with logits (B, {num_classes}) and labels (B,)", loss, logits, _labels(2))
    if not isinstance(value, torch.Tensor) or value.dim() > 0 or not value.requires_grad:
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(f"{name}: returns {found}; the mean loss of the batch is needed, a scalar with a gradient")


def check_schedule(name: str, schedule: Schedule, epochs: int) -> None:
    """Ask for the factor at the start and in the middle of the run."""
    for done in (0.0, epochs / 2):
        factor: Any = _tried(f"{name}: after {done:g} epochs", schedule, done)
        if not isinstance(factor, Real) or not math.isfinite(factor) or factor < 0:
            raise UserError(f"{name}: gives {factor} after {done:g} epochs; a factor of 0 or more is needed")


def check_optimizer(name: str, optimizer: Optimizer) -> None:
    """Look whether it takes steps of its own accord."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"{name}: its step needs a closure; a method of your own can give it one in its hook `step`")


def _labels(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.long)


def _first(make: Callable[[], Iterator[Batch]]) -> Batch:
    images, labels = next(iter(make()))
    return images, labels


def _tried(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError, StopIteration) as error:
        raise UserError(f"{what}: {first_line(error)}") from error
