"""What 16 bits do to the training steps of this run's network: a line at its start, where that costs next to nothing.

A run in 32 bits is told what bfloat16 would give, if that is clearly faster, and how to get it. A run in 16 bits is
warned if its steps are slower than in 32 bits. Only steps of the network itself show that: on a CPU a usual convolution
may be fast in bfloat16 while dilated and grouped ones take 4 to 16 times as long (pytorch issue 183815).
"""

from __future__ import annotations

import logging
import statistics
import time
from functools import partial

import torch

from morphtrain.cost.step import training_step
from morphtrain.cost.stopwatch import timed
from morphtrain.errors import said
from morphtrain.precision import auto as precisions
from morphtrain.precision.autocast import SLOW
from morphtrain.schema import Custom
from morphtrain.state import Run
from morphtrain.trainer.auto import Choice, Step, clearly_fastest, twin
from morphtrain.trainer.process import return_freed_memory
from morphtrain.world import decide

ROUNDS = 3  # of a step of each, whose median counts
SHARE = 0.005  # of the run's steps, that these may be at the most
HOPELESS = 3.0  # times as long as in 32 bits in the first step: not timed again
MOST_CHOICES = 3

log = logging.getLogger(__name__)


def say(run: Run) -> None:
    """Time a few steps of copies of the network, and log what they show; the run itself is left alone.

    Not done for a run of fewer than 2400 steps, one that is compiled or fills its memory, and other formats than o0, o1
    and bf16.
    """
    if _is_worth_it(run):
        decide(lambda: _say(run))


def _say(run: Run) -> None:
    start = time.perf_counter()
    try:
        seconds = step_seconds(run)
    except Exception as error:  # noqa: BLE001 (the run does without it, whatever a network of the user's own raises)
        log.info("what 16 bits would do to a training step is not known: %s", said(error))
        return
    return_freed_memory()  # or the copies would be in the peak of the first epoch
    if not seconds:
        return
    spent, plain = time.perf_counter() - start, next(iter(seconds))
    if run.config.precision.name == plain.precision:
        best, ratio = clearly_fastest(seconds)
        if best != plain:
            log.info("%s", _offer(plain, best, ratio, spent))
        return
    own = next(reversed(seconds))
    if (ratio := seconds[own] / seconds[plain]) > SLOW:
        log.warning(
            "precision=%s: a training step of this network takes %.1f times as long as with precision=o0 "
            "(measured in %.2g s); precision=auto takes the faster one",
            *(own.precision, ratio, spent),
        )


def step_seconds(run: Run) -> dict[Choice, float]:
    """The median time of a step of a copy of the network with each choice: first in 32 bits, last as the run has it.

    For a run in 32 bits the others are those in bfloat16, also in channels_last; without those that are hopeless. Where
    a CPU emulates bfloat16 nothing is timed.
    """
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        kinds = _kinds(run)
        if len(kinds) == 1:
            return {}
        twins = {name: twin(run, name) for name in {choice.memory_format for choice in kinds}}
        steps: dict[Choice, Step] = {
            choice: partial(training_step, *twins[choice.memory_format], dtype) for choice, dtype in kinds.items()
        }
        first = {choice: timed(step, run.device) for choice, step in steps.items()}  # chooses kernels, maps memory
        plain = next(iter(steps))
        is_own = run.config.precision.name != plain.precision
        turns = [choice for choice in steps if is_own or first[choice] <= HOPELESS * first[plain]]
        spent: dict[Choice, list[float]] = {choice: [] for choice in turns}
        for _ in range(ROUNDS):
            for choice in turns:
                spent[choice].append(timed(steps[choice], run.device))
            turns.reverse()
    return {choice: statistics.median(times) for choice, times in spent.items()}


def _is_worth_it(run: Run) -> bool:
    config = run.config
    if isinstance(config.precision, Custom) or config.precision.name not in ("o0", "o1", "bf16"):
        return False
    if run.compilation is not None or config.batch_policy.name == "fill_memory":
        return False
    steps = config.epochs * len(run.data.train) / config.first_batch_size
    return SHARE * steps >= MOST_CHOICES * (1 + ROUNDS)


def _kinds(run: Run) -> dict[Choice, torch.dtype | None]:
    """What is tried, with the type that operations are cast to."""
    own_format = run.chosen.get("memory_format", run.config.memory_format)
    plain = Choice(own_format, "o0")
    if run.config.precision.name != plain.precision:
        return {plain: None, Choice(own_format, run.config.precision.name): run.precision.dtype}
    if "bf16" not in precisions.worth_trying(run.device):
        return {plain: None}
    formats = dict.fromkeys((own_format, "channels_last"))
    return {plain: None} | {Choice(memory_format, "bf16"): torch.bfloat16 for memory_format in formats}


def _offer(plain: Choice, best: Choice, ratio: float, spent: float) -> str:
    keys = [key for key in ("precision", "memory_format") if getattr(best, key) != getattr(plain, key)]
    return (
        f"{' '.join(f'{key}={getattr(best, key)}' for key in keys)}: a training step would take {ratio:.2f} of its "
        f"time (measured in {spent:.2g} s); {' '.join(f'{key}=auto' for key in keys)} chooses by time alone, accuracy "
        "is yours to judge"
    )
