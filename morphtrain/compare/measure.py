"""The measurement of a comparison: two sides are made, and then take turns."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from morphtrain import schema
from morphtrain.compare import own_code
from morphtrain.compare.own_state import OwnState
from morphtrain.compare.training import epochs, parts_of_epoch, steps
from morphtrain.compare.turns import Spent, in_turns
from morphtrain.errors import UserError
from morphtrain.evidence.interleaved import Turns
from morphtrain.memory_limit import named_if_out_of_memory
from morphtrain.schema import Config
from morphtrain.state import Run
from morphtrain.timing.foreign import Reading, busy_seconds, foreign_share, measurable, own_seconds
from morphtrain.timing.slot import Slot
from morphtrain.trainer import environment
from morphtrain.trainer.epoch import start
from morphtrain.trainer.train import new_run, prepared, sizes

WARMUP_STEPS = 5  # of each side; the first steps choose kernels and map memory

Record = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What one measurement gave.

    Args:
        spent: by side A and by side B, in order, warm-up included.
        warmup: how many of each come first and do not count.
        turns: the seconds by the clock that count, and what disturbed them.
        cpu_turns: the CPU seconds that count; None if this process does not do all the work: a GPU, the user's code.
        records: of the epochs of each side; empty for steps and for the user's own code.
        batch_sizes: images in the last step of each side that is a config.
        machine: as `environment.json`.
    """

    spent: Mapping[str, list[Spent]]
    warmup: int
    turns: Turns
    cpu_turns: Turns | None
    records: Mapping[str, list[Record]]
    batch_sizes: Mapping[str, int]
    machine: Mapping[str, str]


def measure(configs: Sequence[Config], vs: str | None = None, number: int | None = None) -> Measured:
    """Let two sides take turns.

    Args:
        configs: of A and B; of A alone if B is the user's own code.
        vs: where that code is, see `own_code`.
        number: how many steps of each count; None: whole epochs, and each config trains to its end.

    Raises:
        UserError: for a mistake that the user can fix.
        Interrupted: after a signal.
    """
    unit, warmup = ("step", WARMUP_STEPS) if number is not None else ("epoch", _warmup_epochs(configs))
    count = None if number is None else warmup + number
    with prepared(configs[0]) as slot:
        states = {name: OwnState(slot.device) for name in "AB"}
        runs = {name: _started(config, states[name]) for name, config in zip("AB", configs, strict=False)}
        parts = parts_of_epoch(runs.values()) if count is None and vs is None else 1
        sides = {name: states[name].of(_training(run, parts, count)) for name, run in runs.items()}
        if vs is not None:
            sides["B"] = itertools.islice(_own(vs, unit, states["B"]), count or configs[0].epochs)
        spent, foreign, others = _take_turns(sides, slot, unit, warmup * parts)
        machine = environment.describe(slot.device)
    a, b = (spent[name][warmup:] for name in sides)
    if number is not None and min(len(a), len(b)) < number:
        whole = f"there are {min(len(a), len(b)) + warmup} whole batches in all epochs, and {warmup} warm up"
        raise UserError(f"--steps {number}: {whole}; a smaller number, or larger epochs, works")
    changed = any(record["changed"] for run in runs.values() for record in run.history)
    clock, computed = (([getattr(one, kind) for one in a], [getattr(one, kind) for one in b]) for kind in Spent._fields)
    in_process = slot.device.type == "cpu" and vs is None
    return Measured(
        spent=spent,
        warmup=warmup,
        turns=Turns(clock[0], clock[1], unit, changed, foreign, others, parts),
        cpu_turns=Turns(computed[0], computed[1], unit, changed, parts=parts) if in_process else None,
        records={name: run.history for name, run in runs.items()},
        batch_sizes={name: run.batch_size for name, run in runs.items()},
        machine=machine,
    )


def _warmup_epochs(configs: Sequence[Config]) -> int:
    warmup = max(config.timing.warmup_epochs for config in configs)
    for config in configs:
        enough = config.epochs > warmup
        schema.check(enough, "epochs", config.epochs, f"more than timing.warmup_epochs={warmup}, which do not count")
    return warmup


def _started(config: Config, state: OwnState) -> Run:
    """A run that is ready for its first epoch; from then on `state` is what it has for itself."""
    with named_if_out_of_memory(sizes(config)), state.own():
        run = new_run(config, state.device)
        start(run)
    return run


def _training(run: Run, parts: int, count: int | None) -> Iterator[Spent | None]:
    """The epochs of a started run, each in so many turns, or as many of its steps."""
    with named_if_out_of_memory(sizes(run.config)):
        yield from epochs(run, parts) if count is None else itertools.islice(steps(run), count)


def _own(target: str, unit: str, state: OwnState) -> Iterator[Spent]:
    with state.own():
        side = own_code.clocked(target, unit, state.device)
    return state.of(side)


def _take_turns(
    sides: Mapping[str, Iterator[Spent | None]], slot: Slot, unit: str, warmup: int
) -> tuple[dict[str, list[Spent]], float | None, list[int]]:
    """What each side spent, the share of the cores that others used, and who else trained on them."""
    spent: dict[str, list[Spent]] = {name: [] for name in sides}
    others = set(slot.claim.others())
    before = _reading(slot.cpus)
    for name, one in in_turns(sides, warmup):
        if one is not None:
            spent[name].append(one)
        if sys.stderr.isatty():
            print(f"\r{name}: {unit} {len(spent[name])} ", end="", file=sys.stderr)
    after = _reading(slot.cpus)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    foreign = None if before is None or after is None else foreign_share(before, after, len(slot.cpus))
    return spent, foreign, sorted(others | set(slot.claim.others()))


def _reading(cpus: frozenset[int]) -> Reading | None:
    """The kernel's accounting now; None where there is none."""
    return Reading(time.perf_counter(), busy_seconds(cpus), own_seconds()) if cpus and measurable() else None
