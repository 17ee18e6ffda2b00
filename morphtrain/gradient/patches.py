"""The gradient of a convolution's weight from one patch of the input per image and output channel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


class Geometry(NamedTuple):
    """Where the patches of a convolution lie; the tuples have an entry for each dimension of the images."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after
    dilation: tuple[int, ...]
    groups: int


def geometry(
    weight: torch.Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Geometry:
    """That of a convolution with this weight (O, C/groups, *K), by the arguments of `torch.nn.functional.conv2d`."""
    kernel = tuple(weight.shape[2:])
    dilations = _each(dilation, len(kernel))
    if padding == "same":
        more = [spread * (size - 1) for spread, size in zip(dilations, kernel, strict=True)]
        pads = tuple((pad // 2, pad - pad // 2) for pad in more)
    else:
        pads = tuple((pad, pad) for pad in _each(0 if padding == "valid" else padding, len(kernel)))
    return Geometry(kernel, _each(stride, len(kernel)), pads, dilations, groups)


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    """A value for each dimension: the one given for all of them, or theirs."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def weight_gradient(
    x: torch.Tensor, positions: torch.Tensor, values: torch.Tensor, outputs: int, where: Geometry
) -> torch.Tensor:
    """What the gradient of the weight is if an output channel of an image has a gradient in one place alone.

    Each entry of the kernel reads one pixel of every patch, so that its part is a weighted sum of rows of a table of
    pixels, for which torch has a kernel. Nothing larger than the images and the weight is made.

    Args:
        x: the input (B, C, *S), in any memory format.
        positions: (B, O), int64, of the places, as indices into the flattened output.
        values: (B, O), the gradients there, of the type of `x`.
        outputs: O, a multiple of the groups.
        where: the patches lie.

    Returns:
        (O, C/groups, *K)
    """
    table, sizes = _padded(x, where)
    rows = _corners(positions, sizes, where) * where.groups  # (B, O), of the first pixel of each patch
    rows = rows + torch.arange(outputs, device=x.device) // (outputs // where.groups)
    rows, weights = rows.T.contiguous(), values.T.contiguous()  # (O, B)
    parts = []
    for entry in itertools.product(*map(range, where.kernel)):
        shift = 0
        for size, place, spread in zip(sizes, entry, where.dilation, strict=True):
            shift = shift * size + place * spread
        parts.append(F.embedding_bag(rows + shift * where.groups, table, mode="sum", per_sample_weights=weights))
    return torch.stack(parts, dim=2).view(outputs, -1, *where.kernel)


def _padded(x: torch.Tensor, where: Geometry) -> tuple[torch.Tensor, list[int]]:
    """The pixels of the padded images, a row for each and each group: (B * S * groups, C/groups); and the sizes S."""
    sizes = [size + sum(pads) for size, pads in zip(x.shape[2:], where.padding, strict=True)]
    padded = x.new_zeros(x.shape[0], *sizes, x.shape[1])
    inside = tuple(slice(before, before + size) for size, (before, _) in zip(x.shape[2:], where.padding, strict=True))
    padded[(slice(None), *inside)] = x.movedim(1, -1)
    return padded.view(-1, x.shape[1] // where.groups), sizes


def _corners(positions: torch.Tensor, sizes: Sequence[int], where: Geometry) -> torch.Tensor:
    """(B, O): the number of the first pixel of each patch among those of all padded images."""
    reach = [spread * (size - 1) for spread, size in zip(where.dilation, where.kernel, strict=True)]
    lengths = [(size - more - 1) // step + 1 for size, more, step in zip(sizes, reach, where.stride, strict=True)]
    rows = torch.arange(len(positions), device=positions.device)[:, None]  # of the image: (B, 1)
    for number, (size, step) in enumerate(zip(sizes, where.stride, strict=True)):
        place = positions // math.prod(lengths[number + 1 :]) % lengths[number]
        rows = rows * size + place * step
    return rows
