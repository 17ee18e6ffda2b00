"""Whether a model's code may decide by random numbers what it calls; a recording then is one throw of the dice."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Chance(TorchDispatchMode):
    """Notes while it is active whether code draws numbers that it can decide by.

    Those of Python and NumPy are such. A random tensor is only if its value is read; it may as well be added to
    something.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.states = _states()
        self.drawn = self.read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn |= torch.Tag.nondeterministic_seeded in func.tags
        self.read |= self.drawn and func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def decides(self) -> bool:
        """Whether such a number was drawn."""
        return self.read or self.states != _states()


@contextmanager
def kept_chance() -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch's CPU as they are."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(state)


def _states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    _, keys, position, *rest = numpy.random.get_state()
    return (random.getstate(), keys.tobytes(), position, *rest)
