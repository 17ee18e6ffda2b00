"""Channel spaces, and the one operation on them: a structural change is a reindexing of a channel space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain.morph.architecture import refresh_widths
from morphtrain.morph.layers import ZeroBranch
from morphtrain.morph.rebind import forget_parameters, reindex_tensor
from morphtrain.morph.trace import MorphError, Role, Trace, is_within, trace_channels


@dataclass(eq=False)
class Segment:
    """A run of entries of an axis: the channels of one space, `span` entries each, or entries that are fixed."""

    space: Space | None
    span: int = 1
    fixed_size: int = 0

    @property
    def length(self) -> int:
        return self.space.size * self.span if self.space else self.fixed_size


@dataclass(eq=False)
class Axis:
    """One dimension of one module's tensors, divided into segments."""

    path: str
    module: nn.Module
    role: Role
    tensors: tuple[tuple[str, int], ...]
    counter: str | None
    segments: list[Segment]

    @property
    def length(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def weight(self) -> torch.Tensor | None:
        """The weight that makes or uses this axis' channels; None where they only pass through (norms, padding)."""
        weight = None if self.role == "elementwise" else self.module.weight
        assert weight is None or isinstance(weight, torch.Tensor)
        return weight

    def magnitude(self) -> torch.Tensor:
        """max |w| of each entry, over the weight's other dimensions: (length,)."""
        assert self.weight is not None, f"{self.path} has no weights"
        dim = self.tensors[0][1]
        return self.weight.detach().abs().transpose(0, dim).flatten(1).amax(1)


@dataclass(eq=False)
class Slot:
    """The place of a space in an axis."""

    axis: Axis
    segment: Segment

    @property
    def role(self) -> Role:
        return self.axis.role

    @property
    def start(self) -> int:
        """The first entry, in entries of the axis."""
        before = self.axis.segments[: self.axis.segments.index(self.segment)]
        return sum(segment.length for segment in before)

    @property
    def has_weights(self) -> bool:
        return self.axis.weight is not None

    def magnitude(self) -> torch.Tensor:
        """max |w| of each of the space's channels here: (space.size,)."""
        start = self.start
        entries = self.axis.magnitude()[start : start + self.segment.length]
        return entries.view(-1, self.segment.span).amax(1)


@dataclass(eq=False)
class Space:
    """Channels that exist once and appear in many tensors: all its slots change together or not at all."""

    name: str
    size: int
    slots: list[Slot] = field(default_factory=list)

    def __repr__(self) -> str:
        roles = [slot.role for slot in self.slots]
        counts = ", ".join(f"{roles.count(role)} {role}" for role in ("produces", "elementwise", "consumes"))
        return f"Space({self.name!r}, size={self.size}; {counts})"


@dataclass(eq=False)
class Block:
    """A residual branch: `path` computes one operand of a sum and ends in `norm`.

    `spaces` live only inside it, in the order of use: the last one feeds the convolution before `norm`.
    """

    path: str
    norm_path: str
    norm: Any
    spaces: list[Space]


class ChannelGraph:
    """The channel spaces of a model, kept up to date while they are changed."""

    def __init__(self, model: nn.Module, axes: list[Axis], spaces: list[Space], blocks: list[Block]) -> None:
        self.model = model
        self.axes = axes
        self.spaces = spaces
        self.blocks = blocks

    @classmethod
    def trace(cls, model: nn.Module, example_input: torch.Tensor) -> ChannelGraph:
        """Find the channel spaces of `model`; `example_input` is one batch it accepts (a batch of one will do).

        Raises:
            MorphError: naming the operation, module path and source line of what cannot be followed.
        """
        trace = trace_channels(model, example_input)
        axes, spaces = _divide(trace)
        return cls(model, axes, spaces, _find_blocks(trace, spaces))

    def __repr__(self) -> str:
        return "\n".join([f"ChannelGraph of {type(self.model).__name__}:", *map(repr, self.spaces)])

    def space(self, name: str) -> Space:
        """The space of this name; a KeyError lists those there are."""
        for space in self.spaces:
            if space.name == name:
                return space
        raise KeyError(f"no channel space '{name}'; there are {', '.join(s.name for s in self.spaces)}")

    def reindex(self, space: Space, index: Sequence[int] | torch.Tensor, optimizer: Optimizer | None = None) -> None:
        """Make row j of `space` what row `index[j]` was, in every tensor that has a part in it.

        Dropping entries prunes. Repeating entries widens and keeps the function: consumers are divided by the
        multiplicity (Net2Net, Chen et al. 2015, eq. 2.4), and so is the momentum of consumers. Optimizer state of a
        parameter's shape follows. Mode, `requires_grad`, dtype, device, memory format and parameter-group membership
        are kept. Gradients of the changed parameters are dropped: call it between two steps.

        Raises:
            MorphError: before anything is changed, if an entry is out of range or an axis would be left empty.
        """
        index = self._checked(space, index)
        multiplicity = torch.bincount(index, minlength=space.size)[index]
        divisor = 1 / multiplicity.double() if bool((multiplicity > 1).any()) else None
        axes = list(dict.fromkeys(slot.axis for slot in space.slots))
        for axis in axes:
            rows = _rows(axis, space, index)
            scale = _scale(axis, space, divisor) if axis.role == "consumes" and divisor is not None else None
            for name, dim in axis.tensors:
                reindex_tensor(axis.module, name, dim, rows, scale, optimizer)
        space.size = len(index)
        for axis in axes:
            if axis.counter:
                setattr(axis.module, axis.counter, axis.length)
            refresh_widths(axis.module)
        if space.size == 0:
            self._drop_space(space)

    def remove_block(self, block: Block, optimizer: Optimizer | None = None) -> None:
        """Take a residual branch out: what its last norm adds for zeros stays, the convolutions go.

        The network computes what it did, in both modes, if the last of `block.spaces` had no live consumer: then the
        last convolution gave zeros. Sums with a downsampling shortcut keep that shortcut.

        Raises:
            MorphError: if `block` is not (or no longer) one of `self.blocks`.
        """
        if block not in self.blocks:
            raise MorphError(f"'{block.path}' is not a removable block of this graph")
        parent_path, _, name = block.path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        branch = self.model.get_submodule(block.path)
        remainder = ZeroBranch(block.norm).train(branch.training)
        if optimizer is not None:
            kept = set(block.norm.parameters())
            forget_parameters([p for p in branch.parameters() if p not in kept], optimizer)
        setattr(parent, name, remainder)
        self.blocks.remove(block)
        for axis in [a for a in self.axes if is_within(a.path, block.path)]:
            if axis.module is block.norm:
                axis.path = f"{block.path}.norm"
            else:
                self._drop_axis(axis)
        self.spaces = [space for space in self.spaces if space.slots]

    def _checked(self, space: Space, index: Sequence[int] | torch.Tensor) -> torch.Tensor:
        if space not in self.spaces:
            raise MorphError(f"'{space.name}' is not (or no longer) a channel space of this graph")
        index = torch.as_tensor(index, device="cpu")
        if index.dim() != 1:
            raise MorphError(f"index for '{space.name}' must be one-dimensional, not of shape {tuple(index.shape)}")
        if len(index) and (index.dtype is torch.bool or index.is_floating_point()):
            raise MorphError(
                f"index for '{space.name}' must hold positions, not {index.dtype}; of a mask, its nonzero()"
            )
        index = index.long()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < space.size:
            raise MorphError(
                f"index for '{space.name}' must lie in 0..{space.size - 1}, not {int(index.min())}..{int(index.max())}"
            )
        if len(index) == 0:
            for slot in space.slots:
                if slot.axis.tensors and slot.axis.length == slot.segment.length:
                    raise MorphError(f"'{space.name}' cannot be emptied: {slot.axis.path} would have no channel left")
        return index

    def _drop_space(self, space: Space) -> None:
        self.spaces.remove(space)
        for slot in space.slots:
            slot.axis.segments.remove(slot.segment)

    def _drop_axis(self, axis: Axis) -> None:
        self.axes.remove(axis)
        for segment in axis.segments:
            if segment.space:
                segment.space.slots = [slot for slot in segment.space.slots if slot.axis is not axis]


def _rows(axis: Axis, space: Space, index: torch.Tensor) -> torch.Tensor:
    """The entries of `axis` once `space` is reindexed, as entries of the axis before."""
    parts, start = [], 0
    for segment in axis.segments:
        if segment.space is space:
            parts.append((start + index[:, None] * segment.span + torch.arange(segment.span)).flatten())
        else:
            parts.append(torch.arange(start, start + segment.length))
        start += segment.length
    return torch.cat(parts)


def _scale(axis: Axis, space: Space, divisor: torch.Tensor) -> torch.Tensor:
    """A factor for each of these entries: `divisor` for those of `space`, 1 for the others."""
    one = torch.ones(1, dtype=divisor.dtype)
    return torch.cat(
        [
            divisor.repeat_interleave(segment.span) if segment.space is space else one.expand(segment.length)
            for segment in axis.segments
        ]
    )


def _divide(trace: Trace) -> tuple[list[Axis], list[Space]]:
    """Divide the traced axes into segments; a space is a longest run of labels that is contiguous wherever it is."""
    spaces: dict[int, Space] = {}  # by the first label
    fixed = set(trace.fixed.tolist())
    follows = _followers(trace)
    axes: list[Axis] = []
    for traced in trace.axes:
        axis = Axis(traced.path, traced.module, traced.role, traced.tensors, traced.counter, [])
        axes.append(axis)
        head = previous = None
        for label, span in _runs(trace, traced.labels):
            if label in fixed:
                axis.segments.append(Segment(None, fixed_size=span))
            elif previous is not None and follows.get(previous) == label and head is not None:
                if axis.segments[-1] is spaces[head].slots[0].segment:
                    spaces[head].size += 1
            else:
                head = label
                space = spaces.setdefault(label, Space("", 1))
                axis.segments.append(Segment(space, span))
                space.slots.append(Slot(axis, axis.segments[-1]))
            previous = label
    _name(spaces.values())
    return axes, list(spaces.values())


def _runs(trace: Trace, labels: torch.Tensor) -> Iterator[tuple[int, int]]:
    """The channels along an axis: (class of labels, number of neighbouring entries)."""
    values, counts = torch.unique_consecutive(trace.roots[labels], return_counts=True)
    return zip(values.tolist(), counts.tolist(), strict=True)


def _followers(trace: Trace) -> dict[int, int]:
    """label -> the label that comes right behind it, wherever either of the two occurs, with the same span."""
    occurrences: dict[int, int] = {}
    pairs: dict[tuple[int, int], int] = {}
    for axis in trace.axes:
        previous: tuple[int, int] | None = None
        for label, span in _runs(trace, axis.labels):
            occurrences[label] = occurrences.get(label, 0) + 1
            if previous and previous[1] == span:
                pair = (previous[0], label)
                pairs[pair] = pairs.get(pair, 0) + 1
            previous = (label, span)
    return {a: b for (a, b), n in pairs.items() if n == occurrences[a] == occurrences[b]}


def _name(spaces: Iterable[Space]) -> None:
    """Name each space after its first producer; spaces that share one are numbered in its order."""
    for space in spaces:
        slot = next((s for s in space.slots if s.role == "produces"), space.slots[0])
        siblings = [s for s in slot.axis.segments if s.space]
        number = f":{siblings.index(slot.segment)}" if len(siblings) > 1 else ""
        space.name = slot.axis.path + number


def _find_blocks(trace: Trace, spaces: list[Space]) -> list[Block]:
    blocks = []
    for branch in trace.branches:
        inner = [s for s in spaces if all(is_within(slot.axis.path, branch.path) for slot in s.slots)]
        if inner and isinstance(branch.last, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            blocks.append(Block(branch.path, branch.last_path, branch.last, inner))
    return blocks
