"""Which devices can train, and their peak memory."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

from morphtrain import world
from morphtrain.errors import UserError

# See proc(5): writing 5 resets the peak of the resident set size, VmHWM.
CLEAR, RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), "5", Path("/proc/self/status")


def pick_device(wanted: str) -> torch.device:
    """The first of `possible_devices`."""
    return possible_devices(wanted)[0]


def possible_devices(wanted: str) -> list[torch.device]:
    """The devices that config key `device` allows this process; raises `UserError` if there are none on this machine.

    Of several processes on a host each has a GPU of its own.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if found is None else found.type
    each = [] if found is None else [torch.device(kind, i) for i in range(torch.accelerator.device_count())]
    if wanted in ("auto", kind):
        return _of_this_process(each, wanted) or [torch.device("cpu")]
    available = ["cpu", *([kind] if each else []), *map(str, each)]
    if wanted not in available:
        raise UserError(f"device={wanted}: not on this machine; there are auto, {', '.join(available)}")
    return _of_this_process([torch.device(wanted)], wanted)


def _of_this_process(devices: list[torch.device], wanted: str) -> list[torch.device]:
    """Those that the other processes of this run on this host do not have.

    A single GPU is the process's own: it is all that its launcher lets it see.
    """
    local = world.local
    if local.size == 1 or not devices or devices[0].type == "cpu":
        return devices
    if devices[0].type != "cuda":
        raise UserError(f"device={wanted}: several processes train on CPUs or CUDA devices; device=cpu works")
    if len(devices) > 1 and local.size > len(devices):
        raise UserError(f"device={wanted}: {local.size} processes on a host with {len(devices)} GPUs; one each works")
    return [devices[local.rank % len(devices)]]


def reset_peak_memory(device: torch.device) -> None:
    """Begin to look for the peak that `peak_memory` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _peak_can_be_reset():
        CLEAR.write_text(RESET_PEAK)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes since `reset_peak_memory`: of tensors on a CUDA device, of the process's resident memory on a CPU.

    None where the system keeps only the peak of the whole life of a process, which may have trained other networks.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not _peak_can_be_reset():
        return None
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return int(peak) * 1024


@functools.cache
def _peak_can_be_reset() -> bool:
    """Whether this is a Linux that lets a process do so; some sandboxes do not."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return "VmHWM" in STATUS.read_text()
