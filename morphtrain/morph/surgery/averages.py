"""Moving averages of a network's parameters, which follow every change of its structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from morphtrain.morph.number_types import exact
from morphtrain.morph.surgery.change import Change, select


class Averages:
    """An exponential moving average of each parameter of a model, through all changes of its structure.

    It is changed as the parameter is: rows that go are cut out, copies are copied, and what reads a channel is divided
    among its copies. So a change does to the network of the averages what it does to the network. It has 32 bits where
    the parameter has 16, in which it would not move.

    `torch.optim.swa_utils.AveragedModel` has the same averages of a model whose structure stays.

    Attributes:
        values: by parameter, of its shape; empty before the first update, as they are where nothing is averaged.
        since: the epochs that were trained when they began.
        statistics: the buffers that belong to the averages as they are, by all of their names; empty if not measured.
    """

    def __init__(self) -> None:
        self.values: dict[nn.Parameter, torch.Tensor] = {}
        self.since = 0.0
        self.statistics: dict[str, torch.Tensor] = {}

    def begin(self, since: float) -> None:
        """Forget everything, and begin again with the next update."""
        self.values, self.since, self.statistics = {}, since, {}

    def update(self, model: nn.Module, kept: float) -> None:
        """Let `kept` (0 to 1) of each average stay, the rest become the parameter; the first one is a copy of it.

        Nothing waits for the device.
        """
        self.statistics = {}
        if not self.values:
            self.values = {p: _copy(p) for p in model.parameters() if p.is_floating_point()}
            return
        average = get_ema_multi_avg_fn(kept)
        short = [p for p, value in self.values.items() if p.dtype is not value.dtype]
        wide = [p for p, value in self.values.items() if p.dtype is value.dtype]
        for some in filter(None, (wide, *([p] for p in short))):  # each of these needs a copy of 32 bits
            average([self.values[p] for p in some], [exact(p.detach()) for p in some], None)

    @contextmanager
    def in_place(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Give parameters their averages within the block, each in its own number format.

        What the block writes into them, it writes into the averages; what it leaves alone keeps all of its 32 bits.
        """
        given = {p: self.values[p].to(p.dtype) for p in parameters if p in self.values}
        before = {p: p.data for p in given}
        short = {p for p, value in given.items() if value is not self.values[p]}
        try:
            for p, value in given.items():
                p.data = value.clone() if p in short else value
            yield
        finally:
            for p, data in before.items():
                written, p.data = p.data, data
                if p in short:
                    self.values[p].copy_(torch.where(written == given[p], self.values[p], written))

    def follow(
        self,
        old: nn.Parameter,
        new: nn.Parameter,
        changes: Sequence[Change] | None,
        value: torch.Tensor | None = None,
    ) -> None:
        """Give `new`, which `old` has become, its average.

        Args:
            changes: of its rows; None: it has nothing in common with what it was, and begins again.
            value: the new average, if it is known.
        """
        self.statistics = {}
        average = self.values.pop(old, None)
        if average is None:
            return
        if value is not None:
            self.values[new] = exact(value)
        else:
            self.values[new] = _copy(new) if changes is None else select(average, changes)

    def adopt(self, new: nn.Parameter) -> None:
        """Begin the average of a parameter that has been added."""
        self.statistics = {}
        if self.values:
            self.values[new] = _copy(new)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note that parameters have gone."""
        self.statistics = {}
        for parameter in parameters:
            self.values.pop(parameter, None)


def averages_of(optimizer: Optimizer) -> Averages:
    """The averages of an optimizer's parameters, which it carries with it; none at first."""
    found: Averages = vars(optimizer).setdefault("averages", Averages())
    return found


def _copy(parameter: nn.Parameter) -> torch.Tensor:
    """The values of a parameter in a tensor of their own, in 32 bits or more."""
    return exact(parameter.detach()).clone()
