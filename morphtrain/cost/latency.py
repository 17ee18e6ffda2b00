"""What the layers of a network cost in seconds, measured on this device.

    cost = measured_cost(graph, batch_size=128, autocast=precision.autocast)
    cost({space: space.size // 2})              # seconds of a training step's layers with half of these channels

Each kind of layer is timed at a few widths, a training step of the layer alone, and the time at all others follows from
a model of four parts, none of them negative: every pair of an input and an output channel, every channel of either
side, and the layer as such. Times are kept in a file for the next run (`latency_file`).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from morphtrain.cost import latency_file
from morphtrain.cost.layer_steps import Autocast, LayerSteps, Widths
from morphtrain.cost.stopwatch import timed
from morphtrain.cost.widths import Layer, Term, WidthCost, layers_of
from morphtrain.errors import UserError
from morphtrain.morph import ChannelGraph
from morphtrain.timing.foreign import ForeignCpu, measurable
from morphtrain.timing.processor import processor
from morphtrain.world import decide

LIMIT = 5.0  # seconds that a table may take; the round it is in is finished
ROUNDS, MOST_ROUNDS = 3, 12  # of steps of each layer
AGREEING = 1.1  # times the fastest: when the second fastest takes no longer, the fastest is believed
LEAST = 1e-3  # seconds that are timed at once: shorter steps are repeated
CROWDED = 0.1  # of the CPUs: others that use more than what this process leaves, and this, disturb it

Terms = dict[str, list[float]]  # kind of layer -> the numbers of its `Term`, as a checkpoint holds them

log = logging.getLogger(__name__)


class Timing(NamedTuple):
    """Seconds of a step, the fastest of a few, and whether the second fastest took as long."""

    seconds: float
    agrees: bool


def measured_cost(
    graph: ChannelGraph,
    batch_size: int,
    autocast: Autocast = nullcontext,
    *,
    known: Terms | None = None,
    limit: float = LIMIT,
) -> WidthCost:
    """Seconds of a training step's layers by the widths of the spaces, measured where the model is.

    A layer counts with its forward and backward pass, the norm after it and a ReLU, in the model's type and memory
    format, with the present number of threads. What lies between layers (sums, pooling, the optimizer) does not. All
    processes of a run get the numbers of the first.

    Args:
        batch_size: images that go through the network at once.
        autocast: the context the network runs in.
        known: terms found before, which are used as they are; those that are found now are added. With a
            checkpoint's, a resumed run has the prices it had, whatever `batch_size` and `autocast` are now.
        limit: seconds to measure at the most, besides two first steps of every layer and the round that is going on.
    """
    terms = {} if known is None else known
    steps = LayerSteps(graph, batch_size, autocast)
    layers: dict[str, list[Layer]] = {}
    for layer in layers_of(graph):
        layers.setdefault(steps.kind(layer), []).append(layer)
    unknown = {kind: alike for kind, alike in layers.items() if kind not in terms}
    if unknown:
        terms.update(decide(lambda: _terms(steps, unknown, limit)))
    return WidthCost(graph, "latency", term_of=lambda layer: Term(*terms[steps.kind(layer)]))


def known_terms(state: Mapping[str, object], key: str) -> Terms:
    """The terms in a method's part of a checkpoint, as `known` takes them.

    Raises:
        UserError: naming config key `key`, for a checkpoint whose costs are by the roofline model of earlier versions.
    """
    if state.get("roofline") is not None:
        raise UserError(
            f"{key}=latency: this checkpoint counts in seconds of the roofline model, which earlier versions had; "
            "start again with resume=never in another hydra.run.dir"
        )
    found: Terms = state.get("latency", {})  # type: ignore[assignment]
    return found


def fitted(seconds: Mapping[Widths, float]) -> Term:
    """The term without negative parts whose squared relative errors at these widths add up to the least."""
    from scipy.optimize import nnls

    times = np.array(list(seconds.values()))
    parts = np.array([(n0 * n1, n0, n1, 1.0) for n0, n1 in seconds]) / times[:, None]
    scale = parts.max(0)
    found, _ = nnls(parts / scale, np.ones(len(times)))
    return Term(*(found / scale).tolist())


def fastest(steps: Sequence[Callable[[], None]], device: torch.device, limit: float) -> list[Timing]:
    """Time steps in turns, so that what slows the machine slows all of them, until the two fastest of each agree."""
    end = time.perf_counter() + limit
    repeats = [1] * len(steps)
    for number, step in enumerate(steps):
        step()  # picks kernels, maps memory
        repeats[number] = max(1, math.ceil(LEAST / timed(step, device)))
    seconds: list[list[float]] = [[] for _ in steps]
    turns = list(range(len(steps)))
    for _ in range(MOST_ROUNDS):
        for number in turns:
            work = partial(_repeat, steps[number], repeats[number])
            seconds[number].append(timed(work, device) / repeats[number])
        turns = [number for number in reversed(turns) if not _agree(seconds[number])]
        if not turns or time.perf_counter() > end:
            break
    return [Timing(min(found), _agree(found)) for found in seconds]


def _terms(steps: LayerSteps, layers: Mapping[str, Sequence[Layer]], limit: float) -> Terms:
    """The terms of every kind of layer, from the file or measured now."""
    start = time.perf_counter()
    facts = {**_machine(steps.device), **steps.facts}
    kept = latency_file.read(facts)
    wanted = {
        (kind, widths): layer for kind, alike in layers.items() for layer in alike for widths in steps.widths(layer)
    }
    missing = {place: layer for place, layer in wanted.items() if _name(place[1]) not in kept.get(place[0], {})}
    seconds = {(kind, widths): kept[kind][_name(widths)] for kind, widths in wanted.keys() - missing.keys()}
    if missing:
        found, sound = _measured(steps, missing, limit)
        seconds |= {place: timing.seconds for place, timing in found.items()}
        _keep(facts, {place: timing.seconds for place, timing in found.items() if sound and timing.agrees})
        spent, doubtful = time.perf_counter() - start, sum(not (sound and t.agrees) for t in found.values())
        log.info(
            "latency: %d kinds of layers at %d widths in %.1f s, %d known before; %d disturbed, not kept",
            *(len(layers), len(wanted), spent, len(wanted) - len(missing), doubtful),
        )
    return {kind: list(fitted({w: seconds[k, w] for k, w in wanted if k == kind})) for kind in layers}


def _measured(
    steps: LayerSteps, places: Mapping[tuple[str, Widths], Layer], limit: float
) -> tuple[dict[tuple[str, Widths], Timing], bool]:
    """The time of each layer at its widths, and whether others have left this process the CPUs it needed."""
    cpus = frozenset(os.sched_getaffinity(0)) if steps.device.type == "cpu" and measurable() else frozenset()
    foreign = ForeignCpu(cpus)
    if cpus:
        foreign.begin()
    work = [steps.step(layer, widths) for (_, widths), layer in places.items()]
    found = dict(zip(places, fastest(work, steps.device, limit), strict=True))
    free = len(cpus) - torch.get_num_threads()
    return found, not cpus or len(cpus) * foreign.share() <= max(free, 0) + CROWDED * len(cpus)


def _keep(facts: Mapping[str, str], seconds: Mapping[tuple[str, Widths], float]) -> None:
    table: latency_file.Table = {}
    for (kind, widths), spent in seconds.items():
        table.setdefault(kind, {})[_name(widths)] = spent
    if table:
        latency_file.add(facts, table)


def _machine(device: torch.device) -> dict[str, str]:
    """What the times depend on besides the network and its batch, by name."""
    return {
        "device": device.type,
        "processor": processor(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def _name(widths: Widths) -> str:
    return f"{widths[0]}x{widths[1]}"


def _agree(seconds: Sequence[float]) -> bool:
    """Whether a step was timed often enough, and twice without being disturbed."""
    if len(seconds) < ROUNDS:
        return False
    first, second = sorted(seconds)[:2]
    return second <= AGREEING * first


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()
