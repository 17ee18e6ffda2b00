"""Several pieces of work in turns, A B B A or B A A B: neighbours in time share what the machine does meanwhile."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
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


class Randomness:
    """The random states of Python, NumPy and torch that belong to one side; at first those that there are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states = self._taken()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Within the block the states are the side's; after it those that were there before."""
        around = self._taken()
        self._give(self.states)
        try:
            yield
        finally:
            self.states = self._taken()
            self._give(around)

    def of(self, side: Iterator[T]) -> Iterator[T]:
        """What `side` gives, with random states of its own."""
        while True:
            with self.own():
                given = next(side, None)
            if given is None:
                return
            yield given

    def _taken(self) -> tuple[Any, ...]:
        on_device = None if self.device.type == "cpu" else self._module().get_rng_state(self.device)
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device

    def _give(self, states: tuple[Any, ...]) -> None:
        python, numpy, cpu, on_device = states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if on_device is not None:
            self._module().set_rng_state(on_device, self.device)

    def _module(self) -> Any:
        return torch.get_device_module(self.device)
