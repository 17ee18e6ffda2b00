"""What would take more memory than there is: refused before it is taken, or recognised when an allocation fails."""

from __future__ import annotations

import math
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from morphtrain.byte_sizes import readable
from morphtrain.errors import UserError

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
MOST_TENSORS = 30_000  # of a network; the deepest published ones have some ten thousand

# How the allocators of torch on CPUs and on accelerators, and torch's arithmetic of sizes, say that it is too much.
TOO_MUCH = re.compile(
    r"can't allocate memory|not enough memory|out of memory|size calculation overflowed", re.IGNORECASE
)
SIZE = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGTPE]?i?B)|(sizes=\[[\d, ]+\])", re.IGNORECASE)


def machine_bytes() -> int:
    """The memory of the machine, or of its container if that may have less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
    return memory if text == "max" else min(memory, int(text))


@contextmanager
def within_machine() -> Iterator[None]:
    """Inside it, an allocation above the memory of the machine fails, for it would have the kernel end the process.

    Linux grants memory that is not there until it is used. This limits what the process may ask for; elsewhere it
    changes nothing.
    """
    if not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    finite = [limit for limit in (soft, machine_bytes() + _swap_bytes()) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(finite), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _swap_bytes() -> int:
    found = re.search(r"SwapTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


@contextmanager
def named_if_out_of_memory(keys: str) -> Iterator[None]:
    """Turn memory that runs out inside it into a `UserError` with the size that was asked for.

    Args:
        keys: what makes it large, with the values, as `schema.size_keys` gives them.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{keys}: out of memory, {wanted_memory(error)} could not be had; lower some of these"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the CPU or on an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and TOO_MUCH.search(str(error)) is not None


def wanted_memory(error: BaseException) -> str:
    """What was asked for when memory ran out, as far as the error says it: "3.7 GiB", or "more memory"."""
    found = SIZE.search(str(error))
    if found is None:
        return "more memory"
    number, text, sizes = found.groups()
    return readable(int(number)) if number else text or f"a tensor of {sizes}"


class AllocationLimit(TorchDispatchMode):
    """Inside it, a tensor that would make all new ones together exceed a limit is refused before it is made.

    What counts is what functions such as `torch.empty` and `torch.zeros` make, on any device, "meta" included. What has
    been freed again counts too.

    Args:
        most_bytes, most_tensors: the limits.
        refuse: is told which limit it was, in words, and raises.
    """

    def __init__(self, most_bytes: float, refuse: Callable[[str], NoReturn], most_tensors: int = MOST_TENSORS) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_bytes, self.most_tensors, self.refuse = most_bytes, most_tensors, refuse
        self.bytes, self.tensors = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        if "size" in names and "device" in names:
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            dtype = given.get("dtype") or torch.get_default_dtype()
            self.bytes += math.prod(map(int, given["size"])) * dtype.itemsize
            self.tensors += 1
            if self.bytes > self.most_bytes:
                self.refuse(f"more than {readable(self.most_bytes)}")
            if self.tensors > self.most_tensors:
                self.refuse(f"more than {self.most_tensors} tensors")
        return func(*args, **(kwargs or {}))
