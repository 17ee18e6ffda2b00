"""Which channels to give up for a budget: those that matter least for what they cost.

    keep = within(graph, channel_importance(graph), WidthCost(graph, "flops"), budget, multiple=8)
    graph.reindex_spaces({space: mask.nonzero().flatten() for space, mask in keep.items()}, optimizer)

The knapsack of HALP (Shen et al., NeurIPS 2022, arXiv 2110.10811), with one difference: there a channel has a price of
its own, here its price follows the widths of the layers around it, as all costs are those of the network that results.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping
from itertools import product
from typing import NamedTuple

import torch

from morphtrain.morph import ChannelGraph, Space
from morphtrain.prune.ladder import DOWN, UP, Direction, Ladder, Removed

ROUNDING = 1e-9  # two sums that differ by so little are equal

Cost = Callable[[Mapping[Space, int]], float]  # of the network with these widths, such as `cost.WidthCost`
OfPools = Mapping[int, float]  # a number of each pool that has it


class Choice(NamedTuple):
    """A point of the ladder, the importance that it loses and what the network costs there."""

    removed: Removed
    lost: float
    cost: float


class OutOfReach(ValueError):
    """A budget that no widths meet.

    Attributes:
        least: the least cost that was found.
    """

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


def within(
    graph: ChannelGraph,
    importance: Mapping[Space, torch.Tensor],
    cost: Cost,
    budget: float,
    *,
    multiple: int = 1,
    min_channels: int = 1,
) -> dict[Space, torch.Tensor]:
    """Masks (size,) of the channels that stay, of every space: the least importance lost for a cost within the budget.

    A heuristic: the best steps down the ladder, one after the other, then exchanges of steps until none helps. Channels
    whose loss costs nothing go even if the budget is met.

    Args:
        importance: of each channel, (size,), what is lost with it; losses add up. Infinite: it stays. Spaces that are
            not named keep all their channels.
        cost: by the widths of the spaces in `importance`, in any unit.
        budget: in the unit of `cost`.
        multiple: the width of every side of a layer is a multiple of this, or all that it has now.
        min_channels: every space keeps at least so many channels, or all that it has now.

    Raises:
        OutOfReach: for a budget that no widths meet, with the least that was found.
        ValueError: for an importance that is no number; `multiple` or `min_channels` below 1.
    """
    search = _Search(Ladder(graph, importance, multiple, min_channels), cost, budget)
    now = search.at(search.ladder.top)
    chosen = search.descended(now)
    if not search.fits(chosen):
        raise OutOfReach(
            f"budget={budget:.6g}: the least that was found is {chosen.cost:.6g}, of {now.cost:.6g} now "
            f"(multiple={multiple}, min_channels={min_channels})",
            chosen.cost,
        )
    return search.ladder.masks(search.improved(chosen).removed)


def narrowest(
    graph: ChannelGraph,
    importance: Mapping[Space, torch.Tensor],
    cost: Cost,
    *,
    multiple: int = 1,
    min_channels: int = 1,
) -> dict[Space, torch.Tensor]:
    """Masks (size,) of the channels that stay, of every space: as far down the ladder as the cost falls.

    Args:
        importance, cost, multiple, min_channels: as in `within`.
    """
    search = _Search(Ladder(graph, importance, multiple, min_channels), cost, budget=-math.inf)
    return search.ladder.masks(search.descended(search.at(search.ladder.top)).removed)


class _Search:
    """Choices on a ladder, within a budget."""

    def __init__(self, ladder: Ladder, cost: Cost, budget: float) -> None:
        self.ladder, self.cost, self.budget = ladder, cost, budget
        self.pools = range(len(ladder.pools))
        self.known: dict[Removed, Choice] = {}

    def at(self, removed: Removed) -> Choice:
        if removed not in self.known:
            cost = float(self.cost(self.ladder.widths(removed)))
            self.known[removed] = Choice(removed, self.ladder.lost(removed), cost)
        return self.known[removed]

    def fits(self, choice: Choice) -> bool:
        return choice.cost <= self.budget

    def descended(self, now: Choice, rates: OfPools | None = None, held: Collection[int] = ()) -> Choice:
        """Step down where the least is lost for what is saved, until the budget is met or nothing saves any more.

        Rates only get worse as the layers around become narrower, so one that is the best after it was looked at again
        is the best of all (lazy greedy, Minoux 1978).

        Args:
            rates: what the next step of a pool loses for what it saves, from a choice nearby; None: not known.
            held: pools that take no step.
        """
        queue = [(-torch.inf if rates is None else rates.get(p, torch.inf), p) for p in self.pools if p not in held]
        heapq.heapify(queue)
        fresh: dict[int, Choice] = {}  # where the steps from here lead
        while queue and not (self.fits(now) and queue[0][0] > 0):
            rate, pool = heapq.heappop(queue)
            if pool in fresh:
                now, fresh = fresh[pool], {}
                heapq.heappush(queue, (rate, pool))
            elif (step := self._down(now, pool)) is not None:
                fresh[pool] = step
                heapq.heappush(queue, (_rate(now, step), pool))
        return now

    def improved(self, best: Choice) -> Choice:
        """A step of one pool, up or down, and what the budget asks for or allows in others, until none helps."""
        directions: tuple[Direction, ...] = (UP, DOWN)
        helped = True
        while helped:
            helped = False
            rates = {p: _rate(best, step) for p in self.pools if (step := self._down(best, p)) is not None}
            added = {p: step.cost - best.cost for p in self.pools if (step := self._step(best, p, UP)) is not None}
            for pool, direction in product(self.pools, directions):
                other = self._exchanged(best, pool, direction, rates, added)
                if other is not None and other.lost < best.lost - ROUNDING * abs(best.lost):
                    best, helped = other, True
        return best

    def _exchanged(
        self, best: Choice, pool: int, direction: Direction, rates: OfPools, added: OfPools
    ) -> Choice | None:
        """The choice after a step of `pool`, and steps of the others that bring it to the budget; None without one."""
        choice = self._step(best, pool, direction)
        if choice is not None and not self.fits(choice):
            choice = self.descended(choice, rates, held={pool})
        if choice is None or not self.fits(choice):
            return None
        return self._filled(choice, added, held={pool} if direction == DOWN else ())

    def _filled(self, now: Choice, added: OfPools, held: Collection[int]) -> Choice:
        """Step up where the most is regained, while the budget allows it.

        Args:
            added: what a step up costs from a choice nearby: it tells which are worth a look.
        """
        while True:
            near = [p for p, cost in added.items() if cost <= 2 * (self.budget - now.cost) and p not in held]
            steps = filter(None, (self._step(now, pool, UP) for pool in near))
            best = min(filter(self.fits, steps), key=lambda choice: choice.lost, default=now)
            if best.lost >= now.lost:
                return now
            now = best

    def _step(self, now: Choice, pool: int, direction: Direction) -> Choice | None:
        removed = self.ladder.step(now.removed, pool, direction)
        return None if removed is None else self.at(removed)

    def _down(self, now: Choice, pool: int) -> Choice | None:
        """As far down as it takes to save something: some widths are no faster than wider ones."""
        step = self._step(now, pool, DOWN)
        while step is not None and step.cost >= now.cost - ROUNDING * abs(now.cost):
            step = self._step(step, pool, DOWN)
        return step


def _rate(before: Choice, after: Choice) -> float:
    """What is lost for each unit of cost that is saved."""
    return (after.lost - before.lost) / (before.cost - after.cost)
