"""What `memory_format=auto` and `precision=auto` stand for in a run: what trains its network clearly faster.

Both are decided together, as lower precision may be fast in one memory format only. Copies of the network train for a
few steps each, in turns, so that what slows the machine slows all of them. The steps are not compiled.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain import schema, slices, world
from morphtrain.cost.copies import copied
from morphtrain.cost.step import blank_batch, casts_of, training_step
from morphtrain.cost.stopwatch import timed
from morphtrain.errors import UserError, said
from morphtrain.memory_limit import is_out_of_memory
from morphtrain.precision import Precision
from morphtrain.precision import auto as precisions
from morphtrain.state import Run, passes
from morphtrain.trainer.build import FORMATS, in_format
from morphtrain.world import decide

CLEARLY = 0.9  # of the time of what is plainer: less is noise, or not worth other numbers
LEAST_ROUNDS, MOST_ROUNDS = 3, 15  # of a step of each, whose median counts
SECONDS = 2.0  # after which no further round begins

Step = Callable[[], None]

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A value of `memory_format` and one of `precision`."""

    memory_format: str
    precision: str


def choose(run: Run) -> None:
    """Settle what is `auto` in a run before its first epoch, the same in every process; `run.chosen` says how.

    What config key `chosen` says is taken, whatever this run measures. It measures all the same: the time for that is
    on the clock of every run, whichever of those that share a choice was the first.
    """
    keys = run.config.automatic
    if not keys:
        return
    start = time.perf_counter()
    seconds = decide(lambda: step_seconds(run))
    fastest, ratio = clearly_fastest(seconds)
    found, plain = {key: getattr(fastest, key) for key in keys}, next(iter(seconds))
    adopt(run, run.config.chosen or found)
    log.info(
        "%s: %s; a step takes %.2f of its time with %s (measured in %.2g s)",
        " ".join(f"{key}=auto" for key in keys),
        *(_typed(found), ratio, " ".join(getattr(plain, key) for key in keys), time.perf_counter() - start),
    )
    if run.chosen != found:
        log.info("%s instead: config key chosen says so", _typed(run.chosen))


def adopt(run: Run, chosen: Mapping[str, str]) -> None:
    """Give a run what was chosen for its keys that are `auto`, before its first step or after it was restored.

    Raises:
        UserError: for what cannot be chosen, or if it is not there for every such key.
    """
    known = {"memory_format": tuple(FORMATS), "precision": tuple(_allowed(run, precisions.candidates(run.device)))}
    for key, values in known.items():
        if _is_auto(run, key):
            schema.check_one_of(key, chosen.get(key), values)
    run.chosen = {key: chosen[key] for key in known if _is_auto(run, key)}
    if "memory_format" in run.chosen:
        run.model = in_format(run.model, chosen["memory_format"])
        run.data = run.data.to(run.device, FORMATS[chosen["memory_format"]])
    if "precision" in run.chosen:
        run.precision = precisions.candidates(run.device)[chosen["precision"]]
        run.precision.prepare(run.model, run.optimizer)


def metrics(run: Run) -> dict[str, float]:
    """What was chosen, as numbers of an epoch's record."""
    found: dict[str, float] = {}
    if "memory_format" in run.chosen:
        found["channels_last"] = float(run.chosen["memory_format"] == "channels_last")
    if "precision" in run.chosen:
        found["precision_bits"] = torch.finfo(run.precision.dtype or torch.float32).bits
    return found


def step_seconds(run: Run) -> dict[Choice, float]:
    """The median time of a training step of the run's network with each choice, the plainest first.

    The batch is noise, of the size that goes through the network at once. The run, its data and its random numbers are
    left alone.
    """
    steps = _steps(run)
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        turns = [choice for choice, step in steps.items() if _trains(run, step, choice)]
        spent: dict[Choice, list[float]] = {choice: [] for choice in turns}
        start = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
                break
            for choice in turns:
                spent[choice].append(timed(steps[choice], run.device))
            turns.reverse()
    return {choice: statistics.median(times) for choice, times in spent.items()}


def clearly_fastest(seconds: Mapping[Choice, float]) -> tuple[Choice, float]:
    """The fastest, by what is clear, and its time as a share of the plainest one's, which comes first.

    Each is taken only if it is clearly faster than the best of those before it, which are plainer.
    """
    plain = best = next(iter(seconds))
    for choice, spent in seconds.items():
        if spent < CLEARLY * seconds[best]:
            best = choice
    return best, seconds[best] / seconds[plain]


def _is_auto(run: Run, key: str) -> bool:
    return key in run.config.automatic


def _typed(chosen: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in chosen.items())


def _steps(run: Run) -> dict[Choice, Step]:
    """A training step of a copy of the network with each choice: precision after precision, in each format."""
    formats = tuple(FORMATS) if _is_auto(run, "memory_format") else (run.config.memory_format,)
    kinds = _allowed(run, precisions.worth_trying(run.device)) if _is_auto(run, "precision") else {"": run.precision}
    twins = {name: twin(run, name) for name in formats}
    return {
        Choice(memory_format, name): partial(training_step, *twins[memory_format], casts_of(precision))
        for name, precision in kinds.items()
        for memory_format in formats
    }


def _allowed(run: Run, kinds: Mapping[str, Precision]) -> dict[str, Precision]:
    """Without float16 where a method takes steps by itself, which its loss scale does not allow."""
    own_steps = bool(run.hooks("step"))
    return {name: kind for name, kind in kinds.items() if kind.dtype is not torch.float16 or not own_steps}


def twin(run: Run, memory_format: str) -> tuple[nn.Module, Optimizer, torch.Tensor, torch.Tensor]:
    """A copy of the network in this format, its optimizer, and a batch for them."""
    model, optimizer = copied(run.model, run.optimizer, torch.clone)
    whole = min(run.config.first_batch_size, len(run.data.train))
    own = max(slices.sizes(whole, world.members()))  # it is timed by a process alone, and trained by all
    at_once = -(-own // passes(own, getattr(run.config.batch_policy, "max_micro_batch", None)))
    images, labels = blank_batch(in_format(model, memory_format), run.data.input_shape, at_once)
    images.normal_(generator=torch.Generator(run.device).manual_seed(0))
    return model, optimizer, images, labels


def _trains(run: Run, step: Step, choice: Choice) -> bool:
    """Whether the network can be trained like this, by a step that also chooses kernels and maps memory.

    False only for a memory format that need not be taken: a `view` in a network may want another one.

    Raises:
        UserError: for a precision that the network cannot be trained in.
    """
    try:
        step()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        if _is_auto(run, "memory_format") and choice.memory_format != next(iter(FORMATS)):
            name = f"memory_format={choice.memory_format}"
            log.info("memory_format=auto: the network does not train with %s: %s", name, said(error))
            return False
        if not _is_auto(run, "precision"):
            raise
        raise UserError(f"precision=auto: the network does not train in {choice.precision}: {said(error)}") from error
    return True
