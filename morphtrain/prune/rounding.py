"""Which widths a pruned network gets: dead channels may stay, or weak live ones go, so that its layers are fast.

    Rounding(multiple=8)                                # up to multiples of 8
    Rounding(probe=WidthProbe(batch_size=128))          # what this device trains fastest

A layer may read several spaces (a concatenation), and a space is part of several layers. So it is the width along each
axis of a weight that is rounded, and the channels of its spaces that go or stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from morphtrain.morph import Axis, ChannelGraph, Space
from morphtrain.prune.width_probe import Kept, WidthProbe

MULTIPLES = (4, 8, 16)  # that a probe compares

Importance = Mapping[Space, torch.Tensor]  # of each channel, (size,), on the CPU


@dataclass(frozen=True)
class Rounding:
    """How the widths of layers follow from the channels that are alive in them.

    Args:
        min_channels: every layer keeps at least this many channels, the most important ones.
        multiple: widths are rounded up to a multiple of this; the most important dead channels stay. 1 with a probe.
        probe: picks the fastest widths: those of the live channels, or multiples of 4, 8 or 16 for each resolution.
        round_down: with a probe: widths may be rounded down as well where that is faster, and the least important live
            channels go. At most those whose importance is this share, in [0, 1), of the median of their space or less.

    Raises:
        ValueError: for `round_down` without a probe, or a probe with a `multiple`.
    """

    min_channels: int = 1
    multiple: int = 1
    probe: WidthProbe | None = None
    round_down: float = 0.0

    def __post_init__(self) -> None:
        if self.round_down and self.probe is None:
            raise ValueError(f"round_down={self.round_down} needs a WidthProbe, to tell which widths are faster")
        if self.multiple != 1 and self.probe is not None:
            raise ValueError(f"multiple={self.multiple}: must be 1 with a probe, which finds the multiples itself")

    def channels_to_keep(self, graph: ChannelGraph, importance: Importance, alive: Kept) -> dict[Space, torch.Tensor]:
        """Masks (size,) of the channels that stay, of every space.

        Args:
            importance: decides which of the dead channels stay, and which of the live ones go.
            alive: masks (size,) of the channels that have to stay, except for what `round_down` allows.
        """
        axes = [axis for axis in graph.axes if axis.weight is not None]
        up = partial(_rounded_up, axes, importance, self.min_channels)
        plain = up(self.multiple, alive)
        if self.probe is None:
            return plain
        options = [plain, *(up(multiple, plain) for multiple in MULTIPLES)]
        if self.round_down:
            floors = {
                space: max(_needed(importance[space][kept], self.round_down), self.min_channels)
                for space, kept in plain.items()
            }
            lower = {multiple: _rounded_down(axes, importance, floors, multiple, plain) for multiple in MULTIPLES}
            # Where too many channels would have to go, the width stays off its multiple: round it up instead.
            options += [*lower.values(), *(up(multiple, kept) for multiple, kept in lower.items())]
        return dict(self.probe.fastest(graph, options))


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
    spaces = _spaces_of(axis)
    if not spaces:
        return False
    width, total = _width(axis, kept), _fixed(axis) + sum(space.size for space in spaces)
    wanted = max(width, min_channels)
    wanted = min(-(-wanted // multiple) * multiple, total)
    if wanted == width:
        return False
    dead = [(float(importance[s][i]), s, i) for s in spaces for i in (~kept[s]).nonzero().flatten().tolist()]
    dead.sort(key=lambda channel: -channel[0])
    for _, space, i in dead[: wanted - width]:
        kept[space][i] = True
    return True


def _rounded_down(
    axes: list[Axis], importance: Importance, floors: Mapping[Space, int], multiple: int, kept: Kept
) -> dict[Space, torch.Tensor]:
    """`kept` without the least important channels above each multiple, where their spaces stay at `floors` or wider."""
    result = {space: mask.clone() for space, mask in kept.items()}
    for axis in axes:
        spare = [c for s in _spaces_of(axis) for c in _spare(s, result[s], importance[s], floors[s])]
        width = _width(axis, result)
        excess = width % multiple
        if excess <= len(spare) and excess < width:
            for _, space, i in sorted(spare, key=lambda channel: channel[0])[:excess]:
                result[space][i] = False
    return result


def _spare(space: Space, kept: torch.Tensor, importance: torch.Tensor, floor: int) -> list[tuple[float, Space, int]]:
    """(importance, space, position) of the kept channels of a space, except for the `floor` most important."""
    order = [i for i in importance.argsort().tolist() if kept[i]]
    return [(float(importance[i]), space, i) for i in order[: max(len(order) - floor, 0)]]


def _needed(importance: torch.Tensor, share: float) -> int:
    """How many channels are above `share` of their median; infinite ones, which have no weights, all are."""
    if len(importance) == 0:
        return 0
    return int((importance.isinf() | (importance > share * importance.median())).sum())


def _spaces_of(axis: Axis) -> list[Space]:
    return [segment.space for segment in axis.segments if segment.space]


def _width(axis: Axis, kept: Kept) -> int:
    """How many channels of `axis` stay, each counted once however many entries it has."""
    return _fixed(axis) + sum(int(kept[space].sum()) for space in _spaces_of(axis))


def _fixed(axis: Axis) -> int:
    return sum(segment.fixed_size for segment in axis.segments)
