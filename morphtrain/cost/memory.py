"""Memory of a training step, and the largest batch that fits a budget. Nothing is computed: no GPU is needed.

Counted are weights, buffers, optimizer state, gradients, the batch, what autograd saves for backward, and whatever else
is alive at the step's fullest moment. Not counted is what a device takes beyond the tensors: NOT_MODELLED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from morphtrain.cost.copies import MOMENTUM_SGD, Optimizing
from morphtrain.cost.search import largest_fitting
from morphtrain.cost.simulate import SimulatedStep

NOT_MODELLED = (
    "workspaces of the kernels, the allocator's rounding and fragmentation, the device's own context, and a data set "
    "that is kept on the device"
)
SIZES = (64, 128)  # batches that are simulated; the cost of a simulation does not depend on the batch


@dataclass(frozen=True)
class MemoryModel:
    """Peak bytes of a training step of any batch: the largest of some lines, `fixed + per_sample * batch`.

    Each line is a moment of the step. With large batches the peak is where most activations are alive, at the start
    of backward: the last line. With few samples and many weights it may be the optimizer's step.
    """

    lines: tuple[tuple[float, float], ...]  # (fixed, per_sample), per_sample rising
    exact: bool  # False: the network does not do the same for every batch, and the only line is an approximation

    @property
    def fixed(self) -> float:
        """Bytes that do not depend on the batch, of the line for large batches."""
        return self.lines[-1][0]

    @property
    def per_sample(self) -> float:
        """Bytes that every sample adds, of the line for large batches."""
        return self.lines[-1][1]

    def peak(self, batch_size: int) -> int:
        """Bytes of a step of `batch_size` samples."""
        return math.ceil(max(fixed + per_sample * batch_size for fixed, per_sample in self.lines))

    def largest_batch(self, budget_bytes: float) -> int:
        """The most samples whose peak is at most `budget_bytes`; 0 if that is none."""
        if self.peak(1) > budget_bytes:
            return 0
        return math.floor(min((budget_bytes - fixed) / slope for fixed, slope in self.lines if slope > 0))


def memory_model(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    optimizer: Optimizing = MOMENTUM_SGD,
    autocast_dtype: torch.dtype | None = None,
    device_type: str | None = None,
) -> MemoryModel:
    """Peak memory of a step as a function of the batch, from two simulated steps.

    Args:
        model: is not changed; simulated in training mode.
        input_shape: of one sample, without the batch.
        optimizer: of the model's parameters, or what makes one of parameters: `torch.optim.AdamW`. Its state counts,
            whether it has any yet or not.
        autocast_dtype: what `torch.autocast` casts to; None for none.
        device_type: of the device that trains; by default the model's.

    Raises:
        ValueError: for a network that decides by the values it computes.
    """
    return fitted(_simulated(model, input_shape, optimizer, autocast_dtype, device_type))


def estimate_memory(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_size: int,
    *,
    optimizer: Optimizing = MOMENTUM_SGD,
    autocast_dtype: torch.dtype | None = None,
    device_type: str | None = None,
) -> int:
    """Peak bytes of a training step of `batch_size` samples, simulated; arguments as in `memory_model`.

    Raises:
        ValueError: for a network that decides by the values it computes, or cannot train on so few samples: batch
            norm over one position needs two.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more")
    return max(_simulated(model, input_shape, optimizer, autocast_dtype, device_type).live_bytes(batch_size))


def max_batch(
    model: nn.Module,
    input_shape: Sequence[int],
    budget_bytes: float,
    *,
    optimizer: Optimizing = MOMENTUM_SGD,
    autocast_dtype: torch.dtype | None = None,
    device_type: str | None = None,
    verified: bool = False,
) -> int:
    """The largest batch whose training step fits `budget_bytes`; other arguments as in `memory_model`.

    With `verified`, on a model that lives on a CUDA device, the one found by `morphtrain.cost.verify.verify_batch`,
    which starts from the estimate and really takes the steps.

    Raises:
        ValueError: if not even one sample fits, saying what it needs, or only batches that cannot be trained on.
    """
    if verified:
        from morphtrain.cost.verify import verify_batch

        found = verify_batch(model, input_shape, budget_bytes, optimizer=optimizer, autocast_dtype=autocast_dtype)
        return found.batch_size
    step = _simulated(model, input_shape, optimizer, autocast_dtype, device_type)
    return fitting_batch(step, fitted(step), budget_bytes)


def fitting_batch(step: SimulatedStep, memory: MemoryModel, budget_bytes: float) -> int:
    """`max_batch` of a step whose model is known already; raises what that raises."""
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


def _simulated(
    model: nn.Module,
    input_shape: Sequence[int],
    optimizer: Optimizing,
    autocast_dtype: torch.dtype | None,
    device_type: str | None,
) -> SimulatedStep:
    return SimulatedStep(
        model,
        input_shape,
        optimizer=optimizer,
        autocast_dtype=autocast_dtype,
        device_type=device_type or next(model.parameters()).device.type,
    )


def fitted(step: SimulatedStep) -> MemoryModel:
    """Every moment's bytes are affine in the batch: two sizes give the line of each."""
    small, large = SIZES
    few, many = step.live_bytes(small), step.live_bytes(large)
    exact = len(few) == len(many)
    if not exact:  # moments that cannot be told which is which
        few, many = [max(few)], [max(many)]
    lines = set()
    for a, b in zip(few, many, strict=True):
        per_sample = (b - a) / (large - small)
        lines.add((a - per_sample * small, per_sample))
    return MemoryModel(_envelope(lines), exact)


def _envelope(lines: set[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Those of the lines that are above all others for some batch of 1 or more."""
    highest = max(lines, key=lambda line: (line[0] + line[1], line[1]))
    envelope = [highest]
    while steeper := [line for line in lines if line[1] > highest[1]]:
        crossings = {line: (highest[0] - line[0]) / (line[1] - highest[1]) for line in steeper}
        highest = min(steeper, key=lambda line: (crossings[line], -line[1]))
        envelope.append(highest)
    return tuple(envelope)
