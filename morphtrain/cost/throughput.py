"""How fast a network trains by its batch size: the fastest batch is often not the largest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from morphtrain.cost.copies import MOMENTUM_SGD, Optimizing, copied
from morphtrain.cost.step import Casts, blank_batch, training_step
from morphtrain.cost.stopwatch import timed
from morphtrain.morph import Averages

WARMUP_STEPS, LEAST_STEPS = 1, 3  # of every size; the first is not timed
GOOD_ENOUGH = 0.95  # of the best rate


def throughput(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_sizes: Iterable[int],
    seconds: float,
    *,
    optimizer: Optimizing = MOMENTUM_SGD,
    precision: Casts = None,
    averaged: bool = False,
) -> dict[int, float]:
    """Samples a second in training steps of each batch size, on the device of the model: the median over its steps.

    The sizes are measured in their order, and each gets an equal share of the time that is left. At the first size
    whose steps would not be over in time at the rate before, the rest is left out. The first size is always measured.

    Args:
        model: is not changed; a copy trains.
        input_shape: of one sample, without the batch.
        seconds: for all sizes together.
        optimizer, precision, averaged: as in `morphtrain.cost.memory_model`.
    """
    sizes = list(batch_sizes)
    twin, its_optimizer = copied(model, optimizer, lambda tensor: tensor.clone())
    averages = Averages() if averaged else None
    rates: dict[int, float] = {}
    end = time.perf_counter() + seconds
    for position, size in enumerate(sizes):
        left = end - time.perf_counter()
        if rates and (WARMUP_STEPS + LEAST_STEPS) * size / rates[sizes[position - 1]] > left:
            break
        images, labels = blank_batch(twin, tuple(input_shape), size)
        step = partial(training_step, twin, its_optimizer, images, labels, precision, averages)
        rates[size] = size / _median_seconds(step, images.device, left / (len(sizes) - position))
    return rates


def _median_seconds(step: Callable[[], None], device: torch.device, share: float) -> float:
    """The median of as many steps as fit into `share` seconds, at least LEAST_STEPS."""
    start = time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < WARMUP_STEPS + LEAST_STEPS or time.perf_counter() - start < share:
        seconds.append(timed(step, device))
    return statistics.median(seconds[WARMUP_STEPS:])


def knee(rates: Mapping[int, float]) -> int:
    """The smallest batch whose rate is within 5 % of the best: larger ones buy nothing but memory."""
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= GOOD_ENOUGH * best)
