"""A run's slot on this host: a device or cores that no other run uses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from morphtrain import interrupts, schema
from morphtrain.errors import UserError
from morphtrain.timing.claims import Claim, Claims, Use, shared_claims
from morphtrain.timing.cores import allowed_cores, pinned

POLL_SECONDS = 0.5  # between two checks whether a slot has become free

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """The device and CPUs that a run has taken."""

    device: torch.device
    cpus: frozenset[int]  # of its cores; empty with a GPU, unless timing.cores is set
    claim: Claim


class _Busy(Exception):
    """There is no free slot; the message says which processes use what."""

    def __init__(self, resources: Sequence[str], processes: Sequence[int]) -> None:
        super().__init__(f"{', '.join(resources)}: in use by process {', '.join(map(str, processes))}")


@contextmanager
def take_slot(
    devices: Sequence[torch.device], timing: schema.timing.Timing, claims: Claims | None = None
) -> Iterator[Slot]:
    """Claim one of `devices` and `timing.cores` cores that no other run uses, for the duration of the block.

    With `timing.cores` this process is pinned to its cores and torch uses one thread per core; both are undone at the
    end. Without it, a run on a CPU claims all cores that it may use, and a run on another device none. If not enough is
    free, `timing.when_busy` decides: "mark" claims what the fewest runs use, "wait" waits, "refuse" raises.

    Args:
        devices: all of one type, the preferred one first.
        timing: the config group `timing`.
        claims: the claims of all processes to share with; None for this user's on this host.

    Raises:
        UserError: if `timing.cores` is more than this process may use, or with `timing.when_busy=refuse` if the device
            or cores are in use.
    """
    cores = allowed_cores()
    if timing.cores is not None and timing.cores > len(cores):
        raise UserError(
            f"timing.cores={timing.cores}: this process may use only {len(cores)}; that many or fewer, or null, works"
        )
    named = {} if devices[0].type == "cpu" else {_name(device): device for device in devices}
    count = timing.cores if timing.cores is not None else (0 if named else len(cores))
    claim = _claimed(claims or shared_claims(), _chooser(list(named), list(cores), count, timing.when_busy), timing)
    try:
        device = next((named[name] for name in claim.resources if name in named), devices[0])
        cpus = frozenset(cpu for name in claim.resources if name in cores for cpu in cores[name])
        with _keeping_to(cpus, timing.cores):
            yield Slot(device, cpus, claim)
    finally:
        claim.release()


def _name(device: torch.device) -> str:
    """A device's name, the same in all processes; its number is not, because of CUDA_VISIBLE_DEVICES."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_properties(device).uuid}"
    return str(device)


def _chooser(
    devices: list[str], cores: list[str], count: int, when_busy: str
) -> Callable[[Sequence[Use]], tuple[str, ...]]:
    """A function of what is in use that picks the least used device (if any) and the `count` least used cores."""

    def choose(uses: Sequence[Use]) -> tuple[str, ...]:
        users = Counter(name for use in uses for name in use.resources)
        chosen = (*sorted(devices, key=lambda name: users[name])[:1], *sorted(cores, key=lambda c: users[c])[:count])
        busy = [name for name in chosen if users[name]]
        if busy and when_busy != "mark":
            raise _Busy(busy, sorted({use.pid for use in uses if set(busy) & set(use.resources)}))
        return chosen

    return choose


def _claimed(claims: Claims, choose: Callable[[Sequence[Use]], tuple[str, ...]], timing: schema.timing.Timing) -> Claim:
    """The claim, made now or once a slot is free."""
    waiting = False
    while True:
        try:
            return claims.claim(choose)
        except _Busy as busy:
            if timing.when_busy == "refuse":
                raise UserError(
                    f"timing.when_busy=refuse: {busy}; timing.when_busy=wait waits for it, mark trains alongside it, "
                    "and a smaller timing.cores may leave room for both"
                ) from busy
            if not waiting:
                log.info("waiting for a free slot (timing.when_busy=wait): %s", busy)
            waiting = True
            interrupts.wait(POLL_SECONDS)


@contextmanager
def _keeping_to(cpus: frozenset[int], threads: int | None) -> Iterator[None]:
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    with pinned(cpus):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
