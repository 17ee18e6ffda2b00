"""Which widths a pruned network gets: dead channels may stay, or weak live ones go, so that its layers are fast.

    Rounding(multiple=8)                                                    # up to multiples of 8
    Rounding(multiple=8, cost_of=lambda graph: measured_cost(graph, 128))    # as far down as this device gets faster

A layer may read several spaces (a concatenation), and a space is part of several layers. So it is the width along each
axis of a weight that is rounded, and the channels of its spaces that go or stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from morphtrain.morph import Axis, ChannelGraph, Space
from morphtrain.prune.knapsack import Cost, narrowest

Importance = Mapping[Space, torch.Tensor]  # of each channel, (size,), on the CPU
Kept = Mapping[Space, torch.Tensor]  # masks (size,) of the channels that stay


@dataclass(frozen=True)
class Rounding:
    """How the widths of layers follow from the channels that are alive in them.

    Args:
        min_channels: every layer keeps at least this many channels, the most important ones.
        multiple: widths are rounded up to a multiple of this; the most important dead channels stay.
        cost_of: what a network costs, by widths: channels that cost nothing stay. None: all go that may.
        round_down: with a cost: widths may be rounded down as well where that saves something, and the least important
            live channels go. At most those whose importance is this share, in [0, 1), of the median of the live ones
            of their space or less.

    Raises:
        ValueError: for `round_down` without `cost_of`.
    """

    min_channels: int = 1
    multiple: int = 1
    cost_of: Callable[[ChannelGraph], Cost] | None = None
    round_down: float = 0.0

    def __post_init__(self) -> None:
        if self.round_down and self.cost_of is None:
            raise ValueError(f"round_down={self.round_down} needs cost_of, to tell where it saves something")

    def channels_to_keep(self, graph: ChannelGraph, importance: Importance, alive: Kept) -> dict[Space, torch.Tensor]:
        """Masks (size,) of the channels that stay, of every space.

        Args:
            importance: decides which of the dead channels stay, and which of the live ones go.
            alive: masks (size,) of the channels that have to stay, except for what `round_down` allows.
        """
        if self.cost_of is None:
            axes = [axis for axis in graph.axes if axis.weight is not None]
            return _rounded_up(axes, importance, self.min_channels, self.multiple, alive)
        needed = {space: kept & ~_weak(importance[space], kept, self.round_down) for space, kept in alive.items()}
        bound = {space: importance[space].masked_fill(kept, torch.inf) for space, kept in needed.items()}
        return narrowest(graph, bound, self.cost_of(graph), multiple=self.multiple, min_channels=self.min_channels)


NO_ROUNDING = Rounding()  # what is alive stays, at least one channel a layer


def _rounded_up(
    axes: list[Axis], importance: Importance, min_channels: int, multiple: int, kept: Kept
) -> dict[Space, torch.Tensor]:
    """`kept` with the most important dead channels that make every width allowed."""
    result = {space: mask.clone() for space, mask in kept.items()}
    while any([_revive(axis, importance, min_channels, multiple, result) for axis in axes]):
        pass  # a channel that stays for one layer may put another off its multiple; channels are only added: this ends
    return result


def _revive(
    axis: Axis, importance: Importance, min_channels: int, multiple: int, kept: Mapping[Space, torch.Tensor]
) -> bool:
    """Add the most important dead channels of `axis` to `kept` until its width is allowed; False if it was before."""
    spaces = [segment.space for segment in axis.segments if segment.space]
    if not spaces:
        return False
    fixed = sum(segment.fixed_size for segment in axis.segments)
    width, total = fixed + sum(int(kept[s].sum()) for s in spaces), fixed + sum(s.size for s in spaces)
    wanted = max(width, min_channels)
    wanted = min(-(-wanted // multiple) * multiple, total)
    if wanted == width:
        return False
    dead = [(float(importance[s][i]), s, i) for s in spaces for i in (~kept[s]).nonzero().flatten().tolist()]
    dead.sort(key=lambda channel: -channel[0])
    for _, space, i in dead[: wanted - width]:
        kept[space][i] = True
    return True


def _weak(importance: torch.Tensor, alive: torch.Tensor, share: float) -> torch.Tensor:
    """(size,): the live channels whose importance is `share` of their median or less; none with a share of 0."""
    if share == 0 or not alive.any():
        return torch.zeros_like(alive)
    return alive & (importance <= share * importance[alive].median())
