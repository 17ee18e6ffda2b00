"""A change of a tensor's rows, and the tensor after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from morphtrain.morph.formats import format_of


class Change(NamedTuple):
    """Row j along `dim` becomes the old row `rows[j]`, times `scale[j]`."""

    dim: int
    rows: torch.Tensor
    scale: torch.Tensor | None = None


def select(tensor: torch.Tensor, changes: Sequence[Change]) -> torch.Tensor:
    """The tensor after the changes, a new one, in its memory format."""
    new = tensor.detach()
    for dim, rows, scale in changes:
        new = new.index_select(dim, rows.to(tensor.device))
        if scale is not None:
            shape = [1] * new.dim()
            shape[dim] = -1
            new = new * scale.to(device=new.device, dtype=new.dtype).view(shape)
    memory_format = format_of(tensor)
    if memory_format is torch.contiguous_format:
        return new.contiguous()
    # contiguous(memory_format=...) would return a tensor of a single channel as it is, with its format lost.
    return torch.empty(new.shape, dtype=new.dtype, device=new.device, memory_format=memory_format).copy_(new)
