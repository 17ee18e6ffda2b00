"""The largest batch that fits a budget of memory: by the memory model alone, or tried on the device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from morphtrain.cost.copies import MOMENTUM_SGD, Optimizing
from morphtrain.cost.memory import MemoryModel, fitted
from morphtrain.cost.search import largest_fitting
from morphtrain.cost.simulate import SimulatedStep
from morphtrain.cost.step import Casts
from morphtrain.cost.verify import verify_batch


def max_batch(
    model: nn.Module,
    input_shape: Sequence[int],
    budget_bytes: float,
    *,
    optimizer: Optimizing = MOMENTUM_SGD,
    precision: Casts = None,
    device_type: str | None = None,
    averaged: bool = False,
    verified: bool = False,
) -> int:
    """The largest batch whose training step fits `budget_bytes`.

    Args:
        model, input_shape, optimizer, precision, device_type, averaged: as in `morphtrain.cost.memory_model`.
        budget_bytes: for tensors; `morphtrain.cost.memory.NOT_MODELLED` says what a device takes beyond them.
        verified: start from the estimate and really take steps, as `morphtrain.cost.verify.verify_batch` does. The
            model has to live on a CUDA device.

    Raises:
        ValueError: if not even one sample fits, saying what it needs, or only batches that cannot be trained on.
    """
    step = SimulatedStep(
        model, input_shape, optimizer=optimizer, precision=precision, device_type=device_type, averaged=averaged
    )
    estimate = fitting_batch(step, fitted(step), budget_bytes)
    if not verified:
        return estimate
    found = verify_batch(
        model, input_shape, budget_bytes, guess=estimate, optimizer=optimizer, precision=precision, averaged=averaged
    )
    return found.batch_size


def fitting_batch(step: SimulatedStep, memory: MemoryModel, budget_bytes: float) -> int:
    """`max_batch` of a step that was simulated before, and its memory model; raises what that raises."""
    guess = memory.largest_batch(budget_bytes)
    if not memory.exact:
        guess = largest_fitting(lambda size: max(step.live_bytes(size)) <= budget_bytes, max(guess, 1), tolerance=0)
    if guess == 0:
        raise ValueError(f"nothing fits {budget_bytes:.0f} bytes: a step of one sample takes {memory.peak(1)}")
    if guess == 1:
        try:
            step.live_bytes(1)
        except ValueError as error:
            needed = f"a step of two samples takes {memory.peak(2)} bytes, more than {budget_bytes:.0f}"
            raise ValueError(f"one sample fits, but cannot be trained on ({error}); {needed}") from error
    return guess
