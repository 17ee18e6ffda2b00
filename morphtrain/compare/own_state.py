"""What each side of a comparison has for itself in the process that both share: random states, and torch's settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.backends import cudnn, mkldnn

T = TypeVar("T")
Setting = tuple[Callable[[], Any], Callable[[Any], object]]  # how to ask for it, and how to set it

FLAGS = ((cudnn, ("enabled", "benchmark", "deterministic")), (mkldnn, ("enabled",)))
SETTINGS: tuple[Setting, ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    *((partial(getattr, module, flag), partial(setattr, module, flag)) for module, flags in FLAGS for flag in flags),
)


class OwnState:
    """The random states of Python, NumPy and torch and torch's settings of one side; at first those that there are.

    Code of the user's own may change any of them, in its `setup()` or later, and means itself by that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.random, self.settings = self._random_states(), _settings()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Within the block the states are the side's; after it those that were there before."""
        around = self._random_states(), _settings()
        self._give(self.random, self.settings)
        try:
            yield
        finally:
            self.random, self.settings = self._random_states(), _settings()
            self._give(*around)

    def of(self, side: Iterator[T]) -> Iterator[T]:
        """What `side` gives, with states of its own."""
        while True:
            with self.own():
                try:
                    given = next(side)
                except StopIteration:
                    return
            yield given

    def _random_states(self) -> tuple[Any, ...]:
        on_device = None if self.device.type == "cpu" else self._module().get_rng_state(self.device)
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device

    def _give(self, states: tuple[Any, ...], settings: list[Any]) -> None:
        python, numpy, cpu, on_device = states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if on_device is not None:
            self._module().set_rng_state(on_device, self.device)
        for (asked, give), value in zip(SETTINGS, settings, strict=True):
            if asked() != value:  # some are slow to set, or warn
                give(value)

    def _module(self) -> Any:
        return torch.get_device_module(self.device)


def _settings() -> list[Any]:
    return [asked() for asked, _ in SETTINGS]
