"""A run's slot on this host: a device or cores that no other run uses; of several processes each has its own."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from morphtrain import host, interrupts, schema, world
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
    beside: frozenset[int] = frozenset()  # ids of the run's processes that have any of these cores, too


@dataclass(frozen=True)
class Mates:
    """The processes of this run on this host, for one of them.

    Attributes:
        ids: of the other ones.
        share: the cores that each process of the run has to itself, the same number for all: what they compute alike
            has the same bits only on as many threads. 1 where there are more processes than cores.
        sharing: how many, with this one, may use the cores that this one may use.
    """

    ids: frozenset[int]
    share: int
    sharing: int


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

    Several processes call this together. Each takes a device, or `timing.cores` cores, of its own; without it those
    on CPUs divide the cores of their host and are pinned to their shares. They wait, go on or raise together, and none
    holds anything while another one waits.

    Args:
        devices: all of one type, the preferred one first.
        timing: the config group `timing`.
        claims: the claims of all processes to share with; None for this user's on this host.

    Raises:
        UserError: if `timing.cores` is more than this process may use, with `timing.when_busy=refuse` if the device or
            cores are in use, or if two processes have one GPU.
    """
    cores = allowed_cores()
    mates = _mates(frozenset(cores))
    world.together(lambda: _check_cores(timing.cores, len(cores), mates))
    named = {} if devices[0].type == "cpu" else {_name(device): device for device in devices}
    divided = world.size() > 1 and not named
    count = timing.cores if timing.cores is not None else mates.share if divided else 0 if named else len(cores)
    choose = _chooser(list(named), list(cores), count, timing.when_busy, mates.ids)
    claim = _claimed(claims or shared_claims(), choose, timing, mates.ids)
    try:
        device = next((named[name] for name in claim.resources if name in named), devices[0])
        _check_own(device)
        cpus = frozenset(cpu for name in claim.resources if name in cores for cpu in cores[name])
        threads = timing.cores if timing.cores is not None else _threads(mates.share) if divided else None
        with _keeping_to(cpus, threads):
            yield Slot(device, cpus, claim, claim.beside() if cpus else frozenset())
    finally:
        claim.release()


def _mates(mine: Set[str]) -> Mates:
    """The processes of this run on this host; `mine` are the names of the cores that this one may use."""
    everyone = world.gathered((host.name(), os.getpid(), frozenset(mine)))
    sharing = [
        sum(place == here and not theirs.isdisjoint(cores) for place, _, theirs in everyone)
        for here, _, cores in everyone
    ]
    share = min(max(1, len(cores) // number) for (_, _, cores), number in zip(everyone, sharing, strict=True))
    ids = frozenset(pid for here, pid, _ in everyone if here == host.name() and pid != os.getpid())
    return Mates(ids, share, sharing[world.rank()])


def _check_cores(wanted: int | None, allowed: int, mates: Mates) -> None:
    """Raise a `UserError` for more cores than the processes of this run that may use them find here."""
    if wanted is None or wanted * mates.sharing <= allowed:
        return
    if mates.sharing == 1:
        raise UserError(
            f"timing.cores={wanted}: this process may use only {allowed}; that many or fewer, or null, works"
        )
    fewer = f"{mates.share} or null" if mates.sharing <= allowed else "null"
    raise UserError(f"timing.cores={wanted}: {mates.sharing} processes may use only {allowed} together; {fewer} works")


def _threads(share: int) -> int:
    """Threads of a process with so many cores: one each, unless whoever started the run has said otherwise.

    torchrun sets the variable, too, to 1, whatever a process has.
    """
    said = "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return torch.get_num_threads() if said else share


def _name(device: torch.device) -> str:
    """A device's name, the same in all processes; its number is not, because of CUDA_VISIBLE_DEVICES."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_properties(device).uuid}"
    return str(device)


def _check_own(device: torch.device) -> None:
    """Raise a `UserError`, in all processes, if two of them have one GPU: a launcher may let each see the same one."""
    names = world.gathered(None if device.type == "cpu" else _name(device))
    for rank, name in enumerate(names):
        if name is not None and name in names[:rank]:
            ranks = f"ranks {names.index(name)} and {rank}"
            works = "let each see all GPUs of its host, or another one (CUDA_VISIBLE_DEVICES)"
            raise UserError(f"device={device}: {ranks} have the same GPU ({name}); {works}")


def _chooser(
    devices: list[str], cores: list[str], count: int, when_busy: str, mates: Set[int] = frozenset()
) -> Callable[[Sequence[Use]], tuple[str, ...]]:
    """A function of what is in use that picks the least used device (if any) and the `count` least used cores.

    What `mates` have is taken last, but is not busy.
    """

    def choose(uses: Sequence[Use]) -> tuple[str, ...]:
        users = Counter(name for use in uses for name in use.resources)
        of_mates = Counter(name for use in uses if use.pid in mates for name in use.resources)

        def used(name: str) -> tuple[int, int]:
            return of_mates[name], users[name]

        chosen = (*sorted(devices, key=used)[:1], *sorted(cores, key=used)[:count])
        strangers = [use for use in uses if use.pid not in mates]
        busy = [name for name in chosen if any(name in use.resources for use in strangers)]
        if busy and when_busy != "mark":
            raise _Busy(busy, sorted({use.pid for use in strangers if set(busy) & set(use.resources)}))
        return chosen

    return choose


def _claimed(
    claims: Claims, choose: Callable[[Sequence[Use]], tuple[str, ...]], timing: schema.timing.Timing, mates: Set[int]
) -> Claim:
    """The claim, made now or once a slot is free; of several processes each has one, or none has."""
    waiting = False
    while True:
        claim, busy = None, None
        try:
            claim = claims.claim(choose, mates)
        except _Busy as found:
            busy = str(found)
        busy = next((found for found in world.gathered(busy) if found is not None), None)
        if busy is None:
            assert claim is not None
            return claim
        if claim is not None:
            claim.release()
        if timing.when_busy == "refuse":
            raise UserError(
                f"timing.when_busy=refuse: {busy}; timing.when_busy=wait waits for it, mark trains alongside it, "
                "and a smaller timing.cores may leave room for both"
            )
        if not waiting:
            log.info("waiting for a free slot (timing.when_busy=wait): %s", busy)
        waiting = True
        interrupts.wait(POLL_SECONDS * _other_turn())


def _other_turn() -> float:
    """1; with several processes by chance, or two runs that each got half of what they need would meet for ever."""
    return 1.0 if world.size() == 1 else world.agree(random.SystemRandom().uniform(0.5, 1.5))


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
