"""Several pieces of work in turns, A B B A or B A A B: neighbours in time share what the machine does meanwhile."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch

from morphtrain.cost.stopwatch import timed
from morphtrain.evidence.interleaved import PAIRS

T = TypeVar("T")


def in_turns(
    sides: Mapping[str, Iterator[T]], warmup: int = 0, rng: random.Random | None = None
) -> Iterator[tuple[str, T]]:
    """What the sides give, one at a time with the side's name: in blocks of two rounds, the second in reverse.

    The order of a block's first round is drawn: what the machine does every so many turns, such as the end of a time
    slice, would otherwise fall to the same side again and again. A side that ends leaves the others to go on.

    Args:
        warmup: how many rounds come before the first block.
        rng: draws the order; None for random numbers of its own, since those of Python belong to the sides.
    """
    rng = rng or random.Random()
    going = list(sides)
    for number in itertools.count(-warmup):
        if number % PAIRS == 0:
            rng.shuffle(going)
        else:
            going.reverse()
        if not going:
            return
        for name in tuple(going):
            for given in sides[name]:
                yield name, given
                break
            else:
                going.remove(name)


class Spent(NamedTuple):
    """What a piece of work takes by the clock, and what this process's threads compute: others add nothing to that."""

    seconds: float
    cpu_seconds: float


def spent(work: Callable[[], object], device: torch.device) -> Spent:
    """What `work` takes, from an idle `device` until it is idle again."""
    computed = time.process_time()
    seconds = timed(work, device)
    return Spent(seconds, time.process_time() - computed)
