"""The processes of a run that are on one host: how its cores are divided among them, and memory that they share.

Two of them are on one host if they see each other's files in /proc. One process is the plain case: it has all cores,
and memory of its own. Every process has to call these functions, in the same order.

How `shared` works: the first process of a host makes the value, and puts the values of its large tensors into files
without names (memfd), one each. A further one, the letter, gets the pickled value, with the paths of those in place of
the tensors. The letter is locked until it is written; the others open it by its path in /proc, wait for the lock, and
map the files. A file is gone once nobody maps it or has it open.
"""

from __future__ import annotations

import fcntl
import io
import math
import mmap
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from morphtrain import interrupts, world

T = TypeVar("T")

BOOT, PROCESSES = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
SMALL = 2**16  # bytes; what is smaller has little to gain
POLL_SECONDS = 0.05


def name() -> tuple[str, ...]:
    """What is the same in processes that see each other's files in /proc, and in no others."""
    try:
        return BOOT.read_text(), os.readlink(PROCESSES), str(os.getuid())
    except OSError:  # not Linux
        return (socket.gethostname(),)


def cores() -> Fraction:
    """How many cores this process may use. One that others of the run may use, too, is divided among them."""
    mine = allowed()
    everyone = [cpus for host, cpus in world.gathered((name(), mine)) if host == name()]
    return sum((Fraction(1, sum(cpu in cpus for cpus in everyone)) for cpu in mine), Fraction(0))


def shared(make: Callable[[], T]) -> T:
    """What `make` returns in the first process of this host, which alone calls it, as a copy in each of the processes.

    The tensors in it that are on the CPU lie in memory that they all share, so that nobody may write to them. The
    others wait, however long it takes. A failure on any host is raised in all processes. Other systems than Linux have
    no such memory: there, every process makes its own.

    Args:
        make: waits for no other process; large tensors that it makes with `empty` are not copied.
    """
    if world.size() == 1:
        return make()
    if not hasattr(os, "memfd_create"):
        return world.together(make)
    hosts = world.gathered(name())
    first = hosts.index(name())
    with _files.opened():
        if world.rank() == first:
            letter = _files.new()
            fcntl.flock(letter, fcntl.LOCK_EX)
            world.gathered(_path(letter))
            return world.together(lambda: _written(make, letter))  # when it returns, the others have opened all files
        letter_path = world.gathered("")[first]
        return world.together(lambda: _read(letter_path))


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without values on the CPU; within the `make` of `shared`, in the memory that is shared."""
    if not _files.descriptors or math.prod(shape) * dtype.itemsize < SMALL:
        return torch.empty(*shape, dtype=dtype)
    return _files.tensor(shape, dtype)


def allowed() -> frozenset[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


class _Place(NamedTuple):
    """Where the values of a tensor lie, in a file without a name that belongs to one of the processes."""

    path: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None  # None: contiguous
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        """The tensor, as this process sees it."""
        with open(self.path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        values = torch.frombuffer(memory, dtype=self.dtype)
        return values.view(self.shape) if self.stride is None else values.as_strided(self.shape, self.stride)


class _Files:
    """The files of the tensors that this process shares; none but during `shared`. They end with their last mapping."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []
        self.places: dict[int, tuple[torch.Tensor, _Place]] = {}  # by address, which is taken while the tensor lives

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let `new` open files, and close them at the end; what is mapped of them stays."""
        try:
            yield
        finally:
            for descriptor in self.descriptors:
                os.close(descriptor)
            self.descriptors, self.places = [], {}

    def new(self) -> int:
        """The descriptor of a new file."""
        self.descriptors.append(os.memfd_create("morphtrain"))
        return self.descriptors[-1]

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> torch.Tensor:
        """A tensor without values, in a new file."""
        descriptor = self.new()
        os.ftruncate(descriptor, math.prod(shape) * dtype.itemsize)
        place = _Place(_path(descriptor), tuple(shape), stride, dtype)
        made = place.tensor()
        self.places[made.data_ptr()] = made, place
        return made

    def place(self, tensor: torch.Tensor) -> _Place:
        """Where these values lie; in a new file if they do not yet lie in one."""
        made, known = self.places.get(tensor.data_ptr(), (None, None))
        if known is not None and made is not None and _is_same(made, tensor):
            return known
        stride = tensor.stride() if _is_channels_last(tensor) else None
        _, place = self.places[self.tensor(tensor.shape, tensor.dtype, stride).copy_(tensor).data_ptr()]
        return place


class _Packer(pickle.Pickler):
    """Pickles where the values of tensors lie, not the values."""

    def persistent_id(self, value: Any) -> _Place | None:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.nbytes >= SMALL:
            return _files.place(value.detach())
        return None


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, place: _Place) -> torch.Tensor:
        return place.tensor()


_files = _Files()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors at one address are the same."""
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _written(make: Callable[[], T], letter: int) -> T:
    """Make the value, write it to `letter`, and unlock that; left empty if it cannot be made."""
    packed = io.BytesIO()
    try:
        _Packer(packed).dump(make())
        with open(letter, "wb", closefd=False) as file:
            file.write(packed.getbuffer())
    finally:
        fcntl.flock(letter, fcntl.LOCK_UN)
    packed.seek(0)
    value: T = _Unpacker(packed).load()
    return value


def _read(path: str) -> Any:
    """What the first process has written, once it is written; None if it could not, and has an error for all."""
    with open(path, "rb") as letter:
        while not _is_written(letter.fileno()):
            interrupts.wait(POLL_SECONDS)
        packed = letter.read()
    return _Unpacker(io.BytesIO(packed)).load() if packed else None


def _is_written(letter: int) -> bool:
    """Whether the first process has unlocked it, or has ended."""
    try:
        fcntl.flock(letter, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
