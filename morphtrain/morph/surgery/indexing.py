"""Index arithmetic of a reindexing: from the channels of spaces to the entries of axes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from morphtrain.morph.spaces import Axis, Segment, Space


def multiplicity(space: Space, index: torch.Tensor) -> torch.Tensor | None:
    """1 / how often each entry's row is repeated; None if none is."""
    counts = torch.bincount(index, minlength=space.size)
    return 1 / counts[index].double() if bool((counts > 1).any()) else None


def rows_of(axis: Axis, indices: Mapping[Space, torch.Tensor]) -> torch.Tensor:
    """The entries of `axis` once the spaces are reindexed, as entries of the axis before."""
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


def scale_of(
    axis: Axis, indices: Mapping[Space, torch.Tensor], divisors: Mapping[Space, torch.Tensor]
) -> torch.Tensor | None:
    """A factor for each of these entries: the multiplicity's inverse; None if nothing is repeated."""
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
