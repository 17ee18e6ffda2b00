"""The largest batch that really trains on a CUDA device, tried in fresh processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.multiprocessing import get_context
from torch.optim import Optimizer

from morphtrain.cost.copies import MOMENTUM_SGD, Optimizing, copied
from morphtrain.cost.search import largest_fitting
from morphtrain.cost.step import Casts, blank_batch, training_step
from morphtrain.morph import Averages

STEPS = 2  # the first one makes the optimizer's state, the second one has gradients and all of it


@dataclass(frozen=True)
class Trial:
    """What two steps of one batch size took; bytes are the allocator's, which holds more than the tensors need."""

    batch_size: int
    fits: bool
    peak_bytes: int  # the most that was reserved
    retries: int  # times the allocator had to return cached memory to go on: fragmentation


@dataclass(frozen=True)
class Verified:
    """A batch size that was trained on, and what was left of the budget."""

    batch_size: int
    margin_bytes: float
    retries: int
    trials: tuple[Trial, ...]


def verify_batch(
    model: nn.Module,
    input_shape: Sequence[int],
    budget_bytes: float,
    *,
    guess: int,
    optimizer: Optimizing = MOMENTUM_SGD,
    precision: Casts = None,
    averaged: bool = False,
) -> Verified:
    """The largest batch, to one percent, that takes two full steps within `budget_bytes` of the model's CUDA device.

    Every size is tried in a process of its own, whose allocator may reserve the budget and no more: a failure leaves
    nothing behind. These processes import the script that calls this, so it needs its `if __name__ == "__main__":`.
    The CUDA context, some hundred MiB, comes on top of the budget.

    Args:
        guess: where to start, as `morphtrain.cost.max_batch` estimates it; the closer, the fewer tries.
        model, input_shape, optimizer, precision, averaged: as in `morphtrain.cost.memory_model`.

    Raises:
        ValueError: for a model that is not on a CUDA device, or of which no batch fits.
        RuntimeError: if a trial ends by anything but memory.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"only a CUDA device verifies a batch; the model is on {device}")
    job = (
        budget_bytes,
        *copied(model, optimizer, lambda tensor: tensor.cpu()),
        tuple(input_shape),
        precision,
        device,
        averaged,
    )
    trials: dict[int, Trial] = {}

    def fits(batch_size: int) -> bool:
        trials[batch_size] = _in_fresh_process(batch_size, *job)
        return trials[batch_size].fits

    best = largest_fitting(fits, guess)
    if best == 0:
        raise ValueError(f"nothing fits {budget_bytes:.0f} bytes of {device}: a step of one sample was tried")
    found = trials[best]
    return Verified(best, budget_bytes - found.peak_bytes, found.retries, tuple(trials.values()))


def _in_fresh_process(batch_size: int, *job: Any) -> Trial:
    """What `_try` sends from another process; `job` holds the rest of its arguments."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(sender, batch_size, *job))
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        trial: Trial = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the trial of {batch_size} samples ended with exit code {process.exitcode}") from None
    process.join()
    return trial


def _try(
    sender: Connection,
    batch_size: int,
    budget_bytes: float,
    model: nn.Module,
    optimizer: Optimizer,
    input_shape: tuple[int, ...],
    precision: Casts,
    device: torch.device,
    averaged: bool,
) -> None:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), device)
    fits = True
    try:
        model.to(device)
        averages = Averages() if averaged else None
        for _ in range(STEPS):
            training_step(model, optimizer, *blank_batch(model, input_shape, batch_size), precision, averages)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        fits = False  # no more here: the exception holds the step's tensors
    stats = torch.cuda.memory_stats(device)
    peak, retries = stats["reserved_bytes.all.peak"], stats["num_alloc_retries"]
    sender.send(Trial(batch_size, fits, peak, retries))
