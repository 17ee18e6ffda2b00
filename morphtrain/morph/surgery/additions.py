"""The entries that growth adds to the parameters of an optimizer, and the learning rate that they have of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain.morph.surgery.change import Change, select

NUMBER = torch.int16  # of a growth


class Additions:
    """Which growth added each entry of a parameter, through all later changes, and its factor on the learning rate.

    New channels are rows and columns of parameters that there are already, so no parameter group can give them a
    learning rate. Their share of a step is scaled instead of their gradient: momentum, Adam and LARS would undo that.

    Attributes:
        growth: the number of the growth that is under way; 0: none, and what is added now is like all else.
        numbers: by parameter, of its shape: the number of the growth that added each entry, 0 for all others. A
            parameter without such entries is not in it.
        factors: on the learning rate, by growth, where it is not 1.
    """

    def __init__(self) -> None:
        self.growth = 0
        self.numbers: dict[torch.Tensor, torch.Tensor] = {}
        self.factors: dict[int, float] = {}

    def follow(self, old: nn.Parameter, new: nn.Parameter, changes: Sequence[Change]) -> None:
        """Give `new`, which `old` has become, its numbers: those of the rows that it was made of.

        A row that occurs again is a copy, which the growth that is under way has added.
        """
        numbers = self.numbers.pop(old, None)
        copies = {change.dim: _copies(change.rows) for change in changes} if self.growth else {}
        if numbers is None and not any(map(len, copies.values())):
            return
        if numbers is None:
            numbers = torch.zeros_like(old, dtype=NUMBER)
        numbers = select(numbers, [change._replace(scale=None) for change in changes])
        for dim, places in copies.items():
            numbers.index_fill_(dim, places.to(numbers.device), self.growth)
        self.numbers[new] = numbers

    def adopt(self, new: nn.Parameter) -> None:
        """Note that all of a parameter has been added by the growth that is under way."""
        if self.growth:
            self.numbers[new] = torch.full_like(new, self.growth, dtype=NUMBER)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note that parameters have gone."""
        for parameter in parameters:
            self.numbers.pop(parameter, None)

    def set_factors(self, factors: Mapping[int, float]) -> None:
        """Set the factors of all growths; entries whose factors have all become 1 are like all others from then on."""
        self.factors = {growth: factor for growth, factor in factors.items() if factor != 1}
        if not self.factors:
            self.numbers.clear()

    def factor(self, parameter: torch.Tensor) -> float | torch.Tensor:
        """The factor on the learning rate of each entry of a parameter; 1.0 if no entry has one of its own."""
        numbers = self.numbers.get(parameter)
        if numbers is None or not self.factors:
            return 1.0
        found = torch.ones_like(parameter)
        for growth, factor in self.factors.items():
            found.masked_fill_(numbers == growth, factor)
        return found

    @contextmanager
    def paced(self) -> Iterator[None]:
        """Scale the part of the new entries in the step that is taken within the block; all others take it as it is."""
        before = {p: p.detach().clone() for p in self.numbers} if self.factors else {}
        yield
        with torch.no_grad():
            for parameter, old in before.items():
                moved, numbers = parameter - old, self.numbers[parameter]
                for growth, factor in self.factors.items():
                    parameter.copy_(torch.where(numbers == growth, old + factor * moved, parameter))


def additions_of(optimizer: Optimizer) -> Additions:
    """The additions to an optimizer's parameters, which it carries with it; none at first."""
    found: Additions = vars(optimizer).setdefault("additions", Additions())
    return found


def _copies(rows: torch.Tensor) -> torch.Tensor:
    """The places of rows that stand in an earlier place as well."""
    rows = rows.cpu()
    order = rows.argsort(stable=True)
    again = rows[order][1:] == rows[order][:-1]
    return order[1:][again]
