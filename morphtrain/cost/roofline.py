"""How fast a device computes and moves data: the two numbers of the roofline model (Williams et al. 2009)."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from morphtrain.cost.stopwatch import timed

WARMUP_ROUNDS, ROUNDS = 1, 5  # of the latter the median counts
COPIED = 2**25  # numbers of 4 bytes, 128 MiB: no cache holds them


class Roofline(NamedTuple):
    """What a device does in a second, measured."""

    flops_per_second: float
    bytes_per_second: float


@torch.no_grad()
def measure_roofline(device: torch.device) -> Roofline:
    """Measure `device` in a fraction of a second, in single precision; the random state stays.

    The peak is that of a convolution as networks have it (3x3, 64 channels, 32x32 positions), not that of a matrix
    product of ideal shape. The bandwidth is that of a copy, which reads every byte and writes it.
    """
    samples = 8 if device.type == "cpu" else 256  # enough to keep it busy
    images, kernels = torch.ones(samples, 64, 32, 32, device=device), torch.ones(64, 64, 3, 3, device=device)
    flops = 2 * images.numel() * kernels[0].numel()
    source = torch.ones(COPIED, device=device)
    target = torch.ones_like(source)
    return Roofline(
        flops_per_second=flops / _seconds(lambda: F.conv2d(images, kernels, padding=1), device),
        bytes_per_second=2 * source.nbytes / _seconds(lambda: target.copy_(source), device),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of a few passes; one before them picks kernels and maps memory."""
    return statistics.median([timed(work, device) for _ in range(WARMUP_ROUNDS + ROUNDS)][WARMUP_ROUNDS:])
