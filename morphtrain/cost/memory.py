"""Memory of a training step. Nothing is computed: no GPU is needed.

It counts weights, buffers, optimizer state, gradients, the batch, what autograd saves for backward, and whatever else
is alive at the fullest moment of the step. It does not count what a device takes beyond the tensors: NOT_MODELLED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from morphtrain.cost.copies import MOMENTUM_SGD, Optimizing
from morphtrain.cost.simulate import SimulatedStep
from morphtrain.cost.step import Casts

NOT_MODELLED = (
    "workspaces of the kernels, the allocator's rounding and fragmentation, the device's own context, and a data set "
    "that is kept on the device"
)
SIZES = (64, 128)  # batches that are simulated; the cost of a simulation does not depend on the batch


@dataclass(frozen=True)
class MemoryModel:
    """Peak bytes of a training step of any batch: the largest of several lines, `fixed + per_sample * batch`.

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
    precision: Casts = None,
    device_type: str | None = None,
    averaged: bool = False,
) -> MemoryModel:
    """Peak memory of a step as a function of the batch, from two simulated steps.

    Args:
        model: is not changed; it is simulated in training mode.
        input_shape: of one sample, without the batch.
        optimizer: of the model's parameters, or what makes one of parameters: `torch.optim.AdamW`. Its state counts,
            whether it has any yet or not.
        precision: what `torch.autocast` casts to, None for none; or a run's precision.
            Its loss scale does not count.
        device_type: of the device that trains; by default the model's.
        averaged: whether there are averages of the weights, as with config key `ema`.

    Raises:
        ValueError: for a network that decides by the values it computes.
    """
    step = SimulatedStep(
        model, input_shape, optimizer=optimizer, precision=precision, device_type=device_type, averaged=averaged
    )
    return fitted(step)


def estimate_memory(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_size: int,
    *,
    optimizer: Optimizing = MOMENTUM_SGD,
    precision: Casts = None,
    device_type: str | None = None,
    averaged: bool = False,
) -> int:
    """Peak bytes of a training step of `batch_size` samples, simulated; arguments as in `memory_model`.

    Raises:
        ValueError: for a network that decides by the values it computes, or cannot train on so few samples: batch
            norm over one position needs two.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more")
    step = SimulatedStep(
        model, input_shape, optimizer=optimizer, precision=precision, device_type=device_type, averaged=averaged
    )
    return max(step.live_bytes(batch_size))


def fitted(step: SimulatedStep) -> MemoryModel:
    """The memory model of a step. Every moment's bytes are affine in the batch, so two sizes give the line of each."""
    small, large = SIZES
    few, many = step.live_bytes(small), step.live_bytes(large)
    exact = len(few) == len(many)
    if not exact:  # which moment of one is which of the other cannot be told
        few, many = [max(few)], [max(many)]
    lines = set()
    for a, b in zip(few, many, strict=True):
        per_sample = (b - a) / (large - small)
        lines.add((a - per_sample * small, per_sample))
    return MemoryModel(_envelope(lines), exact)


def _envelope(lines: set[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lines that are above all others for some batch of 1 or more, in the order of their slopes."""
    highest = max(lines, key=lambda line: (line[0] + line[1], line[1]))
    envelope = [highest]
    while steeper := [line for line in lines if line[1] > highest[1]]:
        crossings = {line: (highest[0] - line[0]) / (line[1] - highest[1]) for line in steeper}
        highest = min(steeper, key=lambda line: (crossings[line], -line[1]))
        envelope.append(highest)
    return tuple(envelope)
