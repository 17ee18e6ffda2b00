"""From a trace to channel spaces: the labels of all axes are divided into runs that change together."""

from __future__ import annotations

import torch
from torch import nn

from morphtrain.morph.spaces import Axis, ChannelGather, Segment, Slot, Space
from morphtrain.morph.trace.traced import Trace


def divide(trace: Trace) -> tuple[list[Axis], list[Space], list[ChannelGather]]:
    """Divide the traced axes into segments; a space is a longest run of labels that is contiguous everywhere."""
    runs = _Runs(trace)
    spaces: dict[int, Space] = {}  # by the first label
    axes = [Axis(t.path, t.module, t.role, t.tensors, t.counter, [], t.two_sided, t.narrowing) for t in trace.axes]
    for number, label, span, length in runs.segments():
        if label == 0:
            axes[number].segments.append(Segment(None, fixed_size=span))
            continue
        space = spaces.setdefault(label, Space("", length))
        segment = Segment(space, span)
        axes[number].segments.append(segment)
        space.slots.append(Slot(axes[number], segment))
    _name(list(spaces.values()))
    return axes, list(spaces.values()), _gathers(trace, axes)


def _gathers(trace: Trace, axes: list[Axis]) -> list[ChannelGather]:
    by_trace = dict(zip(map(id, trace.axes), axes, strict=True))
    gathers = []
    for traced in trace.gathers:
        source, gathered = by_trace[id(traced.source)], by_trace[id(traced.gathered)]
        matched = _matched(traced.module, source, gathered)
        gathers.append(ChannelGather(traced.module, source, gathered, matched))
    return gathers


class _Runs:
    """The labels of all axes as R runs of equal neighbours, one after the other in flat tensors."""

    def __init__(self, trace: Trace) -> None:
        roots = trace.roots
        labels = [roots[axis.labels] for axis in trace.axes] or [torch.zeros(0, dtype=torch.long)]
        sizes = torch.tensor([len(label) for label in labels])
        # Each axis gets its own range of numbers, so that unique_consecutive never merges runs of two axes.
        number = torch.arange(len(labels)).repeat_interleave(sizes)
        flat = torch.cat(labels)
        keyed, counts = torch.unique_consecutive(number * trace.roots.numel() + flat, return_counts=True)
        self.axis = keyed // trace.roots.numel()  # (R,): the axis that each run is on
        self.label = keyed % trace.roots.numel()  # (R,): the label that the run repeats
        self.span = counts  # (R,): entries of the run

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
        """(R,): whether a run continues the segment of the run before it.

        It does if its label directly follows the label before it, with the same span, wherever either of them appears.
        """
        before, after = self.label[:-1], self.label[1:]
        pairs = (self.axis[:-1] == self.axis[1:]) & (self.span[:-1] == self.span[1:]) & (before != 0) & (after != 0)
        occurrences = torch.bincount(self.label)
        size = len(occurrences)
        keys, inverse = torch.unique(before * size + after, return_inverse=True)
        together = torch.zeros(len(keys), dtype=torch.long).index_add_(0, inverse, pairs.long())
        a, b = keys // size, keys % size
        always = (together == occurrences[a]) & (together == occurrences[b])
        result = torch.zeros(len(self.label), dtype=torch.bool)
        result[1:] = pairs & always[inverse]
        return result


def _name(spaces: list[Space]) -> None:
    """Name each space after its first producer; spaces of the same producer are numbered, in its order."""
    taken: set[str] = set()
    for space in spaces:
        slot = next((s for s in space.slots if s.role == "produces"), space.slots[0])
        siblings = list(dict.fromkeys(s.space for s in slot.axis.segments if s.space))
        space.name = slot.axis.path + (f":{siblings.index(space)}" if len(siblings) > 1 else "")
        while space.name in taken:
            space.name += "'"
        taken.add(space.name)


def _matched(module: nn.Module, source: Axis, gathered: Axis) -> list[tuple[Segment, Segment]]:
    """For each segment of `gathered`, the segment of `source` that its entries come from."""
    starts = dict(source.placed())
    index = module.index.tolist()  # type: ignore[operator]
    return [(segment, starts[index[start]]) for start, segment in gathered.placed()]
