"""Which devices can train, and their peak memory."""

from __future__ import annotations

import resource
import sys

import torch

from morphtrain.errors import UserError


def pick_device(wanted: str) -> torch.device:
    """The first of `possible_devices`."""
    return possible_devices(wanted)[0]


def possible_devices(wanted: str) -> list[torch.device]:
    """The devices that config key `device` allows; raises `UserError` if this machine has none of them."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if found is None else found.type
    each = [] if found is None else [torch.device(kind, i) for i in range(torch.accelerator.device_count())]
    if wanted in ("auto", kind):
        return each or [torch.device("cpu")]
    available = ["cpu", *([kind] if each else []), *map(str, each)]
    if wanted not in available:
        raise UserError(f"device={wanted}: not on this machine; there are auto, {', '.join(available)}")
    return [torch.device(wanted)]


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the epoch's tensors on a CUDA device; elsewhere of the process's resident memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
