"""Channel spaces: the channels that exist once and appear in many tensors, read off a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from morphtrain.morph.trace.propagator import Role, Tensors, Trace


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
    tensors: Tensors
    counter: str | None
    segments: list[Segment]

    @property
    def length(self) -> int:
        return self.length_at({})

    def length_at(self, widths: Mapping[Space, int]) -> int:
        """The length once spaces have these widths; those not named stay as they are."""
        return sum(widths.get(s.space, s.space.size) * s.span if s.space else s.fixed_size for s in self.segments)

    @property
    def weight(self) -> torch.Tensor | None:
        """The weight that makes or uses this axis' channels; None where they only pass through (norms, padding)."""
        if self.role == "elementwise" or not self.tensors:
            return None
        weight: torch.Tensor = getattr(self.module, self.tensors[0][0])
        return weight

    @property
    def dim(self) -> int:
        """The dimension of `weight` that this axis is."""
        return self.tensors[0][1]

    def magnitude(self) -> torch.Tensor:
        """max |w| of each entry, over the weight's other dimensions: (length,)."""
        assert self.weight is not None, f"{self.path} has no weights"
        return self.weight.detach().abs().transpose(0, self.dim).flatten(1).amax(1)

    def placed(self) -> Iterator[tuple[int, Segment]]:
        """Its segments, each with its first entry."""
        start = 0
        for segment in self.segments:
            yield start, segment
            start += segment.length


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
        return next(start for start, segment in self.axis.placed() if segment is self.segment)

    @property
    def has_weights(self) -> bool:
        return self.axis.weight is not None


@dataclass(eq=False)
class Space:
    """Channels that exist once and appear in many tensors: all its slots change together or not at all."""

    name: str
    size: int
    slots: list[Slot] = field(default_factory=list)

    @property
    def is_ambiguous(self) -> bool:
        """Whether a single channel has several entries somewhere: side by side or apart, if there were two?"""
        return self.size == 1 and any(slot.segment.span > 1 for slot in self.slots)

    def __repr__(self) -> str:
        roles = [slot.role for slot in self.slots]
        counts = ", ".join(f"{roles.count(role)} {role}" for role in ("produces", "elementwise", "consumes"))
        return f"Space({self.name!r}, size={self.size}; {counts})"


@dataclass(eq=False)
class Pick:
    """A module whose `index` lists the entries of axis `source` that axis `picked` holds, segment by segment."""

    module: nn.Module
    source: Axis
    picked: Axis
    segments: list[tuple[Segment, Segment]]  # (of picked, of source)

    def refresh(self) -> None:
        """Let the module's index say where the segments are now."""
        starts = {id(segment): start for start, segment in self.source.placed()}
        rows = [torch.arange(p.length) + starts[id(s)] for p, s in self.segments if p in self.picked.segments]
        index = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
        self.module.index = index.to(self.module.index.device)  # type: ignore[arg-type]


def divide(trace: Trace) -> tuple[list[Axis], list[Space], list[Pick]]:
    """Divide the traced axes into segments; a space is a longest run of labels that is contiguous wherever it is."""
    runs = _Runs(trace)
    spaces: dict[int, Space] = {}  # by the first label
    axes = [Axis(t.path, t.module, t.role, t.tensors, t.counter, []) for t in trace.axes]
    for number, label, span, length in runs.segments():
        if label == 0:
            axes[number].segments.append(Segment(None, fixed_size=span))
            continue
        space = spaces.setdefault(label, Space("", length))
        segment = Segment(space, span)
        axes[number].segments.append(segment)
        space.slots.append(Slot(axes[number], segment))
    _name(list(spaces.values()))
    by_trace = dict(zip(map(id, trace.axes), axes, strict=True))
    picks = []
    for traced in trace.picks:
        source, picked = by_trace[id(traced.source)], by_trace[id(traced.picked)]
        picks.append(Pick(traced.module, source, picked, _matched(traced.module, source, picked)))
    return axes, list(spaces.values()), picks


class _Runs:
    """All axes' labels as runs of equal neighbours, one after the other in flat tensors."""

    def __init__(self, trace: Trace) -> None:
        roots = trace.roots
        labels = [roots[axis.labels] for axis in trace.axes] or [torch.zeros(0, dtype=torch.long)]
        sizes = torch.tensor([len(label) for label in labels])
        # Axes are kept apart by numbering the labels of each anew: unique_consecutive then never merges two axes.
        number = torch.arange(len(labels)).repeat_interleave(sizes)
        flat = torch.cat(labels)
        keyed, counts = torch.unique_consecutive(number * trace.roots.numel() + flat, return_counts=True)
        self.axis = keyed // trace.roots.numel()  # (R,) the axis each run is in
        self.label = keyed % trace.roots.numel()  # (R,)
        self.span = counts  # (R,) entries of the run

    def segments(self) -> list[tuple[int, int, int, int]]:
        """(axis, first label, span, number of labels) of every segment, in order."""
        if not len(self.label):
            return []
        heads = ~self._continues()
        starts = heads.nonzero().flatten()
        lengths = torch.diff(starts, append=torch.tensor([len(heads)]))
        columns = (self.axis[starts], self.label[starts], self.span[starts], lengths)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _continues(self) -> torch.Tensor:
        """(R,): whether a run goes on with the segment before it.

        It does if its label stands right behind the other one, with the same span, wherever either of them is.
        """
        before, behind = self.label[:-1], self.label[1:]
        pairs = (self.axis[:-1] == self.axis[1:]) & (self.span[:-1] == self.span[1:]) & (before != 0) & (behind != 0)
        occurrences = torch.bincount(self.label)
        size = len(occurrences)
        keys, inverse = torch.unique(before * size + behind, return_inverse=True)
        together = torch.zeros(len(keys), dtype=torch.long).index_add_(0, inverse, pairs.long())
        a, b = keys // size, keys % size
        always = (together == occurrences[a]) & (together == occurrences[b])
        result = torch.zeros(len(self.label), dtype=torch.bool)
        result[1:] = pairs & always[inverse]
        return result


def _name(spaces: list[Space]) -> None:
    """Name each space after its first producer; spaces that share one are numbered in its order."""
    taken: set[str] = set()
    for space in spaces:
        slot = next((s for s in space.slots if s.role == "produces"), space.slots[0])
        siblings = list(dict.fromkeys(s.space for s in slot.axis.segments if s.space))
        space.name = slot.axis.path + (f":{siblings.index(space)}" if len(siblings) > 1 else "")
        while space.name in taken:
            space.name += "'"
        taken.add(space.name)


def _matched(module: nn.Module, source: Axis, picked: Axis) -> list[tuple[Segment, Segment]]:
    """For each segment of `picked` the segment of `source` that its entries come from."""
    starts = dict(source.placed())
    index = module.index.tolist()  # type: ignore[operator]
    return [(segment, starts[index[start]]) for start, segment in picked.placed()]
