"""Reindexing: from the channels of spaces to the entries of axes, and from these to tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import nn

from morphtrain.morph.errors import MorphError
from morphtrain.morph.spaces import Axis, Segment, Space
from morphtrain.morph.surgery.change import Change
from morphtrain.morph.surgery.rebind import Rebinder

Index = Sequence[int] | torch.Tensor


def checked_index(space: Space, index: Index) -> torch.Tensor:
    """The index as an int64 tensor (new size,) on the CPU.

    Raises:
        MorphError: if it is not a list of positions in `space`, or would widen a space that cannot be widened.
    """
    index = torch.as_tensor(index, device="cpu")
    if index.dim() != 1:
        raise MorphError(f"index for '{space.name}' must be one-dimensional, not of shape {tuple(index.shape)}")
    if len(index) and (index.dtype is torch.bool or index.is_floating_point()):
        raise MorphError(
            f"index for '{space.name}' must hold positions, not {index.dtype}; for a mask, pass its nonzero().flatten()"
        )
    index = index.long()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < space.size:
        raise MorphError(
            f"index for '{space.name}' must lie in 0..{space.size - 1}, not {int(index.min())}..{int(index.max())}"
        )
    if space.is_ambiguous and len(index.unique()) < len(index):
        raise MorphError(f"'{space.name}' cannot be widened: {space.why_not_wider}")
    return index


def check_emptied(spaces: Collection[Space], without: Sequence[Axis] = ()) -> None:
    """Raise a MorphError if an axis, other than those in `without`, would be empty once all `spaces` were emptied."""
    for space in spaces:
        for axis in emptied_axes(space, spaces, without):
            raise MorphError(f"'{space.name}' cannot be emptied: {axis.path} would have no channel left")


def emptied_axes(space: Space, spaces: Collection[Space], without: Sequence[Axis]) -> Iterator[Axis]:
    """The axes of `space`, except those in `without`, that would be empty once all `spaces` were emptied."""
    for axis in dict.fromkeys(slot.axis for slot in space.slots):
        rest = [s for s in axis.segments if s.space not in spaces and s.length]
        if axis.tensors and not rest and axis not in without:
            yield axis


def reindex_tensors(axes: Sequence[Axis], indices: Mapping[Space, torch.Tensor], rebinder: Rebinder) -> None:
    """Apply the indices of spaces to the tensors of `axes`; a tensor with several such axes is replaced once.

    Raises:
        MorphError: before anything is changed, if a weight that is computed cannot change like this.
    """
    divisors = {space: d for space, index in indices.items() if (d := _inverse_multiplicity(space, index)) is not None}
    tensors: dict[tuple[int, str], tuple[str, nn.Module, list[Change]]] = {}
    for axis in axes:
        rows = _rows_of(axis, indices)
        scale = _scale_of(axis, indices, divisors) if axis.role == "consumes" else None
        for name, dim in axis.tensors:
            _, _, sides = tensors.setdefault((id(axis.module), name), (axis.path, axis.module, []))
            sides.append(Change(dim, rows, scale))
    planned = [rebinder.planned(path, module, name, sides) for (_, name), (path, module, sides) in tensors.items()]
    for replacement in chain.from_iterable(planned):  # a computed weight may have refused by now
        rebinder.reindex(replacement)


def _inverse_multiplicity(space: Space, index: torch.Tensor) -> torch.Tensor | None:
    """1 / (how often the row of each entry is repeated); None if no row is repeated."""
    counts = torch.bincount(index, minlength=space.size)
    return 1 / counts[index].double() if bool((counts > 1).any()) else None


def _rows_of(axis: Axis, indices: Mapping[Space, torch.Tensor]) -> torch.Tensor:
    """For each entry that `axis` will have once the spaces are reindexed, the present entry that it comes from."""
    parts = [torch.zeros(0, dtype=torch.long)]
    for start, segment in axis.placed():
        index = indices.get(segment.space) if segment.space else None
        if index is None:
            parts.append(torch.arange(start, start + segment.length))
        elif segment.span == 1:
            parts.append(start + index)
        else:
            parts.append((start + index[:, None] * segment.span + torch.arange(segment.span)).flatten())
    return torch.cat(parts)


def _scale_of(
    axis: Axis, indices: Mapping[Space, torch.Tensor], divisors: Mapping[Space, torch.Tensor]
) -> torch.Tensor | None:
    """A factor for each entry that `axis` will have: 1 / multiplicity; None if nothing is repeated."""
    if not any(segment.space in divisors for segment in axis.segments if segment.space):
        return None
    return torch.cat([_factors(segment, indices, divisors) for segment in axis.segments])


def _factors(
    segment: Segment, indices: Mapping[Space, torch.Tensor], divisors: Mapping[Space, torch.Tensor]
) -> torch.Tensor:
    space = segment.space
    if space is not None and space in divisors:
        return divisors[space].repeat_interleave(segment.span)
    length = len(indices[space]) * segment.span if space is not None and space in indices else segment.length
    return torch.ones(length, dtype=torch.double)
