"""Operations that exist both as layers and as functions: what they do to channels.

If the code gives a size that holds channels as a constant, these channels cannot change. If the code computes the size
(from a shape, or as -1), it follows a change; the constants beside it then say what has to change together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from morphtrain.morph.trace.counts import Count
from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import along, compact, fixed, full, varies
from morphtrain.morph.trace.nodes import call_name


def unchanged(g: LabelledGraph, n: fx.Node, x: fx.Node, value: Any) -> torch.Tensor:
    """Labels after an operation that treats each channel by itself and moves none."""
    labels: torch.Tensor = g.labels[x]
    fits = isinstance(value, torch.Tensor) and value.dim() == labels.dim()
    if not fits or any(varies(labels, d) and value.shape[d] != labels.shape[d] for d in range(labels.dim())):
        g.refuse(n, f"{call_name(n)}, which changes the dimension of the channels")
    return labels


def windowed(g: LabelledGraph, n: fx.Node, x: fx.Node, value: Any, width: int) -> torch.Tensor:
    """Labels after windows, or padding, over the last `width` dimensions; channels in these cannot change."""
    if not isinstance(value, torch.Tensor):
        g.refuse(n, f"{call_name(n)}, which does not give one tensor")
    if g.pin_varying(x, range(-min(width, value.dim()), 0)) and value.shape != g.shape(x):
        return fixed(value.dim())
    return unchanged(g, n, x, value)


def reshaped(
    g: LabelledGraph, x: fx.Node, value: torch.Tensor, sizes: Sequence[Any], counts: Sequence[Count | None]
) -> torch.Tensor:
    """Labels after a view or reshape.

    Args:
        sizes: numbers, or nodes that compute them; -1 follows whatever changes.
        counts: what these numbers count, if they are numbers of channels.
    """
    shape = g.shape(x)
    labels = full(g.labels[x], shape).reshape(value.shape)
    for into, out in matching_dims(shape, value.shape):
        follows = [d for d in out if counts[d] is not None or (isinstance(sizes[d], int) and sizes[d] == -1)]
        if not any(varies(g.labels[x], d) for d in into):
            for d in out:
                _count_none(g, g.labels[x], value.shape[d], counts[d])
            continue
        if len([d for d in follows if value.shape[d] > 1]) != 1:
            g.joins.pin(compact(labels))
            g.pin_counts(counts[d] for d in out)
        for d in out:
            if d not in follows:
                g.joins.tie(labels, d)
        for d in out:
            count = counts[d]
            if count is not None:
                _follow(g, labels, d, g.labels[x], into, count)
    return compact(labels)


def _follow(
    g: LabelledGraph, labels: torch.Tensor, dim: int, before: torch.Tensor, into: Sequence[int], count: Count
) -> None:
    """Join channels such that a size that was computed from a number of channels fits them.

    Args:
        labels: after the reshape, where the size is that of `dim`.
        before: the labels before it, which vary along some of the dimensions `into` that `dim` is made from.
    """
    moved = before.movedim(list(into), list(range(len(into))))
    own = moved.reshape(*moved.shape[: len(into)], -1)[..., 0].flatten()
    if g.changes_with(count, own):
        return
    if count.ratio is not None and len(own) == len(count.labels):
        g.joins.join(own, count.labels)
    else:
        g.fit(labels.movedim(dim, 0).reshape(labels.shape[dim], -1)[:, 0], count)


def _count_none(g: LabelledGraph, labels: torch.Tensor, size: int, count: Count | None) -> None:
    """A number of channels as a size along which no channels lie, unless it is that of a single one."""
    if count is not None and size == 1 == labels.numel():
        g.joins.join(labels, count.labels)
    else:
        g.pin_counts([count])


def matching_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of dimensions that a reshape turns into each other."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        into: list[int] = []
        out: list[int] = []
        a = b = 1
        while not into or not out or a != b:
            if i < len(before) and (a <= b or j == len(after)):
                a *= before[i]
                into.append(i)
                i += 1
            elif j < len(after):
                b *= after[j]
                out.append(j)
                j += 1
            else:
                break
        groups.append((into, out))
    return groups


def flattened(g: LabelledGraph, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Labels after a flatten: a merged dimension follows whatever changes in it."""
    return reshaped(g, x, value, [-1] * value.dim(), [None] * value.dim())


def pixel_shuffled(
    g: LabelledGraph, n: fx.Node, x: fx.Node, value: torch.Tensor, factor: int, up: bool
) -> torch.Tensor:
    """Labels after (C*r*r, H, W) -> (C, H*r, W*r), or back with `up=False`; r*r neighbouring channels are one."""
    line = g.line(x, -3)
    if up:
        groups = line.view(-1, factor * factor)
        g.joins.tie(groups, 1)
        return along(groups[:, 0], -3, value.dim())
    return along(line.repeat_interleave(factor * factor), -3, value.dim())


def channel_shuffled(g: LabelledGraph, n: fx.Node, x: fx.Node, groups: int) -> torch.Tensor:
    """Labels after a channel shuffle, which needs groups of equal width."""
    line = g.line(x, 1).view(groups, -1)
    g.joins.tie(line, 0)
    return along(line.t().flatten(), 1, len(g.shape(x)))
