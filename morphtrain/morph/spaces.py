"""Channel spaces: channels that exist once and appear in many tensors.

A space has a slot in every tensor that holds its channels. A slot lies on an axis, which is one dimension of a module's
tensors; an axis is divided into segments, each the channels of one space or entries that cannot change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from morphtrain.morph.effective import effective

Role = Literal["produces", "consumes", "elementwise"]
Tensors = tuple[tuple[str, int], ...]  # (tensor name, dimension)


@dataclass(eq=False)
class Segment:
    """A run of entries of an axis.

    Args:
        space: whose channels these entries are; None for entries that cannot change.
        span: entries per channel of `space`.
        fixed_size: the number of entries if they cannot change.
    """

    space: Space | None
    span: int = 1
    fixed_size: int = 0

    @property
    def length(self) -> int:
        """The number of entries."""
        return self.space.size * self.span if self.space else self.fixed_size


@dataclass(eq=False)
class Axis:
    """One dimension of one module's tensors, divided into segments.

    Args:
        path: of the module.
        module: the owner of the tensors.
        role: whether its channels are made here, used here, or only pass through.
        tensors: the tensors that have this dimension.
        counter: the module's attribute that holds the length; None if it has none.
        segments: in the order of the entries.
        two_sided: whether one layer makes or passes on these channels with a tensor by which another uses them.
        narrowing: whether its weight is computed such that channels can go, but none can be repeated (spectral norm).
    """

    path: str
    module: nn.Module
    role: Role
    tensors: Tensors
    counter: str | None
    segments: list[Segment]
    two_sided: bool = False
    narrowing: bool = False

    @property
    def length(self) -> int:
        """The number of entries."""
        return self.length_at({})

    def length_at(self, widths: Mapping[Space, int]) -> int:
        """The length if spaces had these widths; spaces that are not named keep theirs."""
        return sum(widths.get(s.space, s.space.size) * s.span if s.space else s.fixed_size for s in self.segments)

    @property
    def has_weight(self) -> bool:
        """Whether a weight makes or uses this axis' channels."""
        return self.role != "elementwise" and bool(self.tensors)

    @property
    def weight(self) -> torch.Tensor | None:
        """The weight that makes or uses this axis' channels; None where they only pass through (norms, padding).

        It is the one that the layer uses; `morphtrain.morph.effective` changes it, for it may be computed.
        """
        return effective(self.module, self.tensors[0][0]) if self.has_weight else None

    @property
    def dim(self) -> int:
        """The dimension of `weight` that this axis is."""
        return self.tensors[0][1]

    def magnitude(self) -> torch.Tensor:
        """max |w| of each entry, over the weight's other dimensions: (length,)."""
        weight = self.weight
        assert weight is not None, f"{self.path} has no weights"
        return weight.detach().abs().transpose(0, self.dim).flatten(1).amax(1)

    def at(self, entry: int) -> Space | None:
        """The space that the entry at this position belongs to; None if it cannot change."""
        return next(s.space for start, s in self.placed() if start <= entry < start + s.length)

    def placed(self) -> Iterator[tuple[int, Segment]]:
        """(position of its first entry, segment) of every segment."""
        start = 0
        for segment in self.segments:
            yield start, segment
            start += segment.length


@dataclass(eq=False)
class Slot:
    """The place of a space on an axis."""

    axis: Axis
    segment: Segment

    @property
    def role(self) -> Role:
        """The role of the axis."""
        return self.axis.role

    @property
    def start(self) -> int:
        """The position of the first entry on the axis."""
        return next(start for start, segment in self.axis.placed() if segment is self.segment)

    @property
    def has_weights(self) -> bool:
        """Whether a weight makes or uses the channels here."""
        return self.axis.has_weight


@dataclass(eq=False)
class Space:
    """Channels that exist once and appear in many tensors: all its slots change together or not at all.

    Args:
        name: the path of the first layer that produces the channels, with a number if it produces several spaces.
        size: the number of channels.
        slots: in the order of use.
    """

    name: str
    size: int
    slots: list[Slot] = field(default_factory=list)

    @property
    def is_ambiguous(self) -> bool:
        """Whether the space cannot be widened: `why_not_wider` says why."""
        return bool(self.why_not_wider)

    @property
    def why_not_wider(self) -> str:
        """Why the space cannot be widened; "" if it can.

        A single channel may have several entries somewhere: the order of the entries of two channels cannot be known
        then. Or one weight both makes and uses the channels (tied autoencoders): it would have to be divided for one
        layer only. Or a weight is computed from all of its entries together (spectral norm).
        """
        if self.size == 1 and any(slot.segment.span > 1 for slot in self.slots):
            return "its single channel has several entries in some tensor"
        for axis in (slot.axis for slot in self.slots):
            if axis.two_sided:
                return "one weight both makes and uses its channels"
            if axis.narrowing:
                return f"copies of channels would change what '{axis.path}' computes, whose weight is computed"
        return ""

    def __repr__(self) -> str:
        roles = [slot.role for slot in self.slots]
        counts = ", ".join(f"{roles.count(role)} {role}" for role in ("produces", "elementwise", "consumes"))
        return f"Space({self.name!r}, size={self.size}; {counts})"


@dataclass(eq=False)
class ChannelGather:
    """A module whose `index` lists the entries of axis `source` that make up axis `gathered`.

    Args:
        segments: (of `gathered`, of `source`): where the entries of each segment of `gathered` come from.
    """

    module: nn.Module
    source: Axis
    gathered: Axis
    segments: list[tuple[Segment, Segment]]

    def refresh(self) -> None:
        """Update the module's index to where the segments are now."""
        starts = {id(segment): start for start, segment in self.source.placed()}
        rows = [torch.arange(g.length) + starts[id(s)] for g, s in self.segments if g in self.gathered.segments]
        index = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
        self.module.index = index.to(self.module.index.device)  # type: ignore[arg-type]


def new_names(before: Sequence[Space], axes: Sequence[Axis]) -> dict[str, str]:
    """The names that spaces found `before` have on the `axes` of a later trace of the same network.

    They have the same places in the same tensors; one that cannot change any more has no new name.
    """
    found = {_dimension(axis): axis for axis in axes}
    names = {}
    for space in before:
        for slot in space.slots:
            axis = found.get(_dimension(slot.axis))
            now = axis.at(slot.start) if axis is not None else None
            if now is not None:
                names[space.name] = now.name
                break
    return names


def _dimension(axis: Axis) -> tuple[int, Tensors, str | None]:
    """Which dimension of which module an axis is, whatever its path and role."""
    return id(axis.module), axis.tensors, axis.counter
