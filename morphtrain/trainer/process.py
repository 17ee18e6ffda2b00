"""Process settings that make training faster."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

# mallopt's parameters (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ONE_GIB = 2**30


def prepare_process() -> None:
    """Apply them. Call it before the first large tensor is made: torch's threads inherit the denormal setting."""
    # Weights that decay towards zero become denormal numbers, on which CPUs are several times slower.
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        keep_freed_memory()
        return_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees: by default every activation is a new mapping, and each of its pages faults.

    `benchmarks/allocator.py` measures what this gains. Without glibc (musl) nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, ONE_GIB)
        mallopt(M_TRIM_THRESHOLD, ONE_GIB)


def return_freed_memory() -> None:
    """Give the system back what an earlier run of this process has freed: it would count in this run's peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
