"""The ladder of widths: those that are multiples of a number in every layer, or all that a layer has.

A layer may read several spaces (a concatenation, a padded shortcut), and it is the width of the whole that counts, as
in `rounding.py`. Spaces that go through the same layers are one pool, whose least important channels go first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch

from morphtrain.morph import Axis, ChannelGraph, Space

Removed = tuple[int, ...]  # how many channels of each pool go: a point of the ladder
DOWN: Literal[1] = 1  # towards narrower layers
UP: Literal[-1] = -1
Direction = Literal[1, -1]


class Pool:
    """Spaces that go through the same layers, equally often.

    Args:
        importance: of each channel, (size,); infinite where it has to stay.
        min_channels: every space keeps at least so many, the most important ones.

    Attributes:
        size: the channels of all its spaces.
        order: (space, position) of those that may go, the least important first.
        lost: the importance of the first i of them, for every i.
        widths: of its spaces without the first i, for every i.
    """

    def __init__(self, spaces: Sequence[Space], importance: Mapping[Space, torch.Tensor], min_channels: int) -> None:
        spare = [found for space in spaces for found in _spare(space, importance[space], min_channels)]
        spare.sort(key=lambda channel: channel[0])
        self.spaces = list(spaces)
        self.size = sum(space.size for space in spaces)
        self.order = [(space, position) for _, space, position in spare]
        self.lost = list(accumulate((r for r, _, _ in spare), initial=0.0))
        self.widths = [{space: space.size for space in spaces}]
        for space, _ in self.order:
            self.widths.append({**self.widths[-1], space: self.widths[-1][space] - 1})

    def masks(self, removed: int) -> dict[Space, torch.Tensor]:
        """(size,) of each space: the channels that stay when the first `removed` go."""
        masks = {space: torch.ones(space.size, dtype=torch.bool) for space in self.spaces}
        for space, position in self.order[:removed]:
            masks[space][position] = False
        return masks


class Side(NamedTuple):
    """One side of a layer: `fixed` channels, and those of pools; `total` with all of them."""

    fixed: int
    pools: tuple[tuple[int, int], ...]  # (position of the pool, how often it occurs here)
    total: int

    def excess(self, width: int, multiple: int, direction: Direction) -> int:
        """How many channels have to go (or come back) until this width is on the ladder."""
        if width == self.total or width % multiple == 0:
            return 0
        return width % multiple if direction == DOWN else min(multiple - width % multiple, self.total - width)


class Ladder:
    """The widths that all layers may have, from one point to the next.

    Args:
        importance: of each channel, (size,), of the spaces that may become narrower.
        multiple, min_channels: as in `knapsack.within`.

    Attributes:
        pools: of the spaces in `importance`.
        top: the point where everything stays.

    Raises:
        ValueError: for an importance that is no number; `multiple` or `min_channels` below 1.
    """

    def __init__(
        self, graph: ChannelGraph, importance: Mapping[Space, torch.Tensor], multiple: int, min_channels: int
    ) -> None:
        if multiple < 1 or min_channels < 1:
            raise ValueError(f"multiple={multiple}, min_channels={min_channels}: both must be 1 or more")
        for space, values in importance.items():
            if bool(values.isnan().any()):
                raise ValueError(f"importance of '{space.name}': not a number (nan)")
        self.multiple, self.spaces = multiple, graph.spaces
        axes = [axis for axis in graph.axes if axis.weight is not None]
        alike: dict[frozenset[tuple[Axis, int]], list[Space]] = {}
        for space in graph.spaces:
            if space in importance:
                times = Counter(slot.axis for slot in space.slots if slot.has_weights)
                alike.setdefault(frozenset(times.items()), []).append(space)
        self.pools = [Pool(spaces, importance, min_channels) for spaces in alike.values()]
        pool_of = {space: number for number, pool in enumerate(self.pools) for space in pool.spaces}
        firsts = {pool.spaces[0] for pool in self.pools}  # all spaces of a pool occur as often as one of them
        sides = dict.fromkeys(_side(axis, pool_of, firsts) for axis in axes)  # many are alike
        self.sides = [side for side in sides if side.pools]
        self.sides_of = [[side for side in self.sides if n in dict(side.pools)] for n in range(len(self.pools))]
        self.top: Removed = (0,) * len(self.pools)

    def step(self, removed: Removed, pool: int, direction: Direction) -> Removed | None:
        """The next point where fewer (or more) channels of a pool stay; None if there is none.

        If no number of channels of the pool alone leads to one, others that share layers with it move the same way.
        """
        points = [self._moved(removed, pool, direction * amount) for amount in range(1, self.multiple + 1)]
        there = [point for point in points if point is not None]
        alone = (point for point in there if not any(self._excess(side, point, DOWN) for side in self.sides_of[pool]))
        found = next(alone, None)
        if found is not None:
            return found
        return next(filter(None, (self._settled(point, direction) for point in there)), None)

    def lost(self, removed: Removed) -> float:
        """The importance of all channels that go."""
        return sum(pool.lost[count] for pool, count in zip(self.pools, removed, strict=True))

    def widths(self, removed: Removed) -> dict[Space, int]:
        """The widths that are left, of the spaces in the pools."""
        widths: dict[Space, int] = {}
        for pool, count in zip(self.pools, removed, strict=True):
            widths.update(pool.widths[count])
        return widths

    def masks(self, removed: Removed) -> dict[Space, torch.Tensor]:
        """(size,) of every space of the graph: the channels that stay."""
        masks = {space: torch.ones(space.size, dtype=torch.bool) for space in self.spaces}
        for pool, count in zip(self.pools, removed, strict=True):
            masks.update(pool.masks(count))
        return masks

    def _excess(self, side: Side, removed: Removed, direction: Direction) -> int:
        left = (times * (self.pools[number].size - removed[number]) for number, times in side.pools)
        return side.excess(side.fixed + sum(left), self.multiple, direction)

    def _moved(self, removed: Removed, pool: int, change: int) -> Removed | None:
        count = removed[pool] + change
        if not 0 <= count <= len(self.pools[pool].order):
            return None
        return (*removed[:pool], count, *removed[pool + 1 :])

    def _settled(self, removed: Removed, direction: Direction) -> Removed | None:
        """The point where all sides are on the ladder, reached from `removed` in one direction; None without one."""
        point: Removed | None = removed
        while point is not None:
            excess, side = next(((e, s) for s in self.sides if (e := self._excess(s, point, direction))), (0, None))
            if side is None:
                return point
            point = self._relieved(point, side, direction * excess)
        return None

    def _relieved(self, removed: Removed, side: Side, change: int) -> Removed | None:
        """A side narrower (or wider) by `change` channels of the one pool where that loses least (or regains most)."""
        points = []
        for number, times in side.pools:
            point = self._moved(removed, number, change // times)
            if change % times == 0 and point is not None:
                points.append(point)
        return min(points, key=self.lost, default=None)


def _spare(space: Space, importance: torch.Tensor, min_channels: int) -> list[tuple[float, Space, int]]:
    """(importance, space, position) of the channels that may go."""
    values = importance.tolist()
    order = importance.argsort(stable=True).tolist()[: max(space.size - min_channels, 0)]
    return [(values[i], space, i) for i in order if values[i] != torch.inf]


def _side(axis: Axis, pool_of: Mapping[Space, int], firsts: Collection[Space]) -> Side:
    fixed, total, pools = 0, 0, Counter[int]()
    for segment in axis.segments:
        space = segment.space
        channels = space.size if space else segment.fixed_size
        total += channels
        if space is None or space not in pool_of:
            fixed += channels
        elif space in firsts:
            pools[pool_of[space]] += 1
    return Side(fixed, tuple(pools.items()), total)
