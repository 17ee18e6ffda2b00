"""How much of the gradient a number format loses because it is too small for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from morphtrain.contracts import Batch
from morphtrain.cost.copies import MOMENTUM_SGD, copied
from morphtrain.layer_calls import seen_again
from morphtrain.morph import exact
from morphtrain.state import Run

SAMPLES = 32  # images that are looked at: few enough to fit beside the run, even in 32 bits


def underflow_share(run: Run) -> float:
    """The share of the gradient's entries that are zero in the run's number format, and not in 32 bits. 0 to 1.

    Of all parameters' gradients, with the present weights and loss scale, on the first images of the epoch's first
    batch: the part of the batch's gradient that comes from them. Copies of the network compute both, so parameters,
    statistics, gradients, data and random numbers are as before.
    """
    images, labels = run.first_batch()
    batch = images[:SAMPLES], labels[:SAMPLES]
    share = len(batch[0]) / len(images)
    precision = run.precision
    scale = getattr(precision, "scale", 1.0)
    lost = _is_zero(run, batch, share * scale, precision.autocast, torch.clone)
    present = ~_is_zero(run, batch, share, nullcontext, lambda tensor: exact(tensor).clone())
    return ((lost & present).sum() / present.sum().clamp(min=1)).item()


def _is_zero(
    run: Run,
    batch: Batch,
    factor: float,
    context: Callable[[], AbstractContextManager[Any]],
    convert: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Which entries of the gradients of `factor` times the loss are zero: one long tensor of bool.

    A copy of the network computes them, whose tensors `convert` has made, in a context.
    """
    images, labels = batch
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        model, _ = copied(run.model, MOMENTUM_SGD, convert)
        with context() as entered:
            loss = run.criterion(exact(model(images)), labels)
        with seen_again(entered):
            (factor * loss).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([(gradient == 0).flatten() for gradient in gradients])
