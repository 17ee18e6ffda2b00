"""Functions and tensor methods that move channels: reshape, permute, expand, concatenate, pad, shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from morphtrain.morph.trace.counts import Count
from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import along, compact, fixed, full, varies
from morphtrain.morph.trace.nodes import argument, call_name, dimensions, first, name_of
from morphtrain.morph.trace.rules.moves import channel_shuffled, flattened, pixel_shuffled, reshaped
from morphtrain.morph.trace.rules.table import Rule, by_name


def _moved(g: LabelledGraph, n: fx.Node, value: Any) -> Any:
    """permute, transpose, unsqueeze, ...: the labels are moved by the same operation."""
    x = first(n)
    labels = full(g.labels[x], g.shape(x))
    rest = g.concrete(n.args[1:])
    if n.op == "call_method":
        moved = getattr(labels, str(n.target))(*rest, **g.concrete(n.kwargs))
    else:
        moved = n.target(labels, *rest, **{k: g.concrete(v) for k, v in n.kwargs.items() if k != "input"})  # type: ignore[operator]
    return compact(moved)


def _repeated(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """A constant may be repeated once for each channel."""
    x = first(n)
    _, counts = _sizes(g, n, list(n.args[1:]) or list(n.kwargs.values())[:1], value.dim())
    given = [dim for dim, count in enumerate(counts) if count is not None]
    if not given:
        return _moved(g, n, value)
    dim, size = given[0], [1] * (value.dim() - len(g.shape(x))) + list(g.shape(x))
    if len(given) == 1 and size[dim] == 1 and g.is_fixed(x) and counts[dim].ratio == 1:  # type: ignore[union-attr]
        return along(counts[dim].labels, dim, value.dim())  # type: ignore[union-attr]
    g.joins.pin(g.labels[x])
    g.pin_counts(counts)
    return fixed(value.dim())


def _made(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """A new tensor, perhaps with a number of channels as one of its sizes."""
    _, counts = _sizes(g, n, list(n.args[1:2] if isinstance(n.args[1], (tuple, list)) else n.args[1:]), value.dim())
    given = [(dim, count) for dim, count in enumerate(counts) if count is not None]
    if len(given) == 1 and given[0][1].ratio == 1:
        return along(given[0][1].labels, given[0][0], value.dim())
    g.pin_counts(counts)
    return fixed(value.dim())


def _reshape(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    if name_of(n) in ("view_as", "reshape_as"):
        other = argument(n, 1, "other")
        return reshaped(g, first(n), value, list(g.shape(other)), g.shape_counts(other))
    sizes = list(n.args[1:]) or list(n.kwargs.values())[:1]
    return reshaped(g, first(n), value, *_sizes(g, n, sizes, value.dim()))


def _sizes(
    g: LabelledGraph, n: fx.Node, arguments: Sequence[Any], rank: int
) -> tuple[Sequence[Any], Sequence[Count | None]]:
    """The sizes that a call is given, one by one or as one shape, and what they count."""
    shape = arguments[0] if len(arguments) == 1 else None
    if isinstance(shape, fx.Node) and isinstance(g.values[shape], tuple):  # of another activation
        known = g.counts.get(shape)
        counts = known if isinstance(known, tuple) else (None,) * rank
        if not isinstance(known, Count) and len(counts) == rank == len(g.values[shape]):
            return list(g.values[shape]), counts
    sizes = list(shape) if isinstance(shape, (tuple, list)) else list(arguments)
    if len(sizes) != rank or any(isinstance(g.concrete(size), tuple) for size in sizes):
        g.refuse(n, f"{call_name(n)} to the shape of another tensor")
    return sizes, [g.count(size) for size in sizes]


def _flatten(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return flattened(g, first(n), value)


def _unflatten(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    dim = argument(n, 1, "dim") % len(g.shape(x))
    sizes: list[Any] = [-1] * len(g.shape(x))
    sizes[dim : dim + 1] = list(argument(n, 2, "sizes"))
    return reshaped(g, x, value, sizes, [g.count(size) for size in sizes])


def _expanded(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    labels: torch.Tensor = g.labels[x]
    rank = value.dim()
    labels = labels.view([1] * (rank - labels.dim()) + list(labels.shape))
    shape = [1] * (rank - len(g.shape(x))) + list(g.shape(x))
    if labels.numel() == 1 and any(size == 1 != wide for size, wide in zip(shape[1:], value.shape[1:], strict=True)):
        g.joins.pin(labels)  # one channel is copied to several
    sizes, counts = _wanted(g, n, rank)
    for dim, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if count is not None and shape[dim] == 1 != value.shape[dim] and labels.numel() == 1 and count.ratio == 1:
            labels = along(count.labels, dim, rank)  # a copy for each channel
        elif varies(labels, dim) and count is not None and labels.numel() == labels.shape[dim]:
            g.fit(labels.flatten(), count)
        elif varies(labels, dim) and not (isinstance(size, int) and size == -1):
            g.joins.pin(labels)
            g.pin_counts([count])
        elif count is not None:
            g.joins.join(labels, count.labels) if value.shape[dim] == 1 == labels.numel() else g.pin_counts([count])
    return labels


def _wanted(g: LabelledGraph, n: fx.Node, rank: int) -> tuple[Sequence[Any], Sequence[Count | None]]:
    """The shape that a tensor is expanded to, and what its sizes count."""
    if name_of(n) == "expand_as":
        other = argument(n, 1, "other")
        return list(g.shape(other)), g.shape_counts(other)
    return _sizes(g, n, list(n.args[1:]) or list(n.kwargs.values())[-1:], rank)


def _rolled(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    if g.pin_varying(first(n), dimensions(argument(n, 2, "dims"), value.dim())):
        return fixed(value.dim())
    labels: torch.Tensor = g.labels[first(n)]
    return labels


def _concatenated(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    parts = list(argument(n, 0, "tensors"))
    return _joined_along(g, parts, argument(n, 1, "dim", 0) % value.dim(), value)


def _joined_along(g: LabelledGraph, parts: Sequence[fx.Node], dim: int, value: torch.Tensor) -> torch.Tensor:
    """Labels of a concatenation: side by side if the channels are in `dim`, otherwise joined."""
    labels = [g.labels[part] for part in parts]
    elsewhere = any(varies(label, d) for label in labels for d in range(value.dim()) if d != dim)
    if elsewhere and not any(varies(label, dim) for label in labels):
        for label in labels[1:]:
            g.joins.join(labels[0], label)
        return max(labels, key=torch.Tensor.numel)
    shape = [max(label.shape[d] for label in labels) for d in range(value.dim())]
    wide = []
    for part, label in zip(parts, labels, strict=True):
        shape[dim] = g.shape(part)[dim]
        wide.append(label.expand(shape))
    return compact(torch.cat(wide, dim))


def _stacked(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Activations of one shape in a new dimension: their channels are joined one by one."""
    parts = list(argument(n, 0, "tensors"))
    labels = [g.labels[part].unsqueeze(argument(n, 1, "dim", 0)) for part in parts]
    for label in labels[1:]:
        g.joins.join(labels[0], label)
    return max(labels, key=torch.Tensor.numel)


def _narrowed(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    g.pin_varying(x, [argument(n, 1, "dim")])
    return _moved(g, n, value)


def _padded(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The code fixes the number of zeros beside the channels, so they cannot change; nor can what is added to them."""
    labels: torch.Tensor = g.labels[first(n)]
    pads = argument(n, 1, "pad")
    for k in range(len(pads) // 2):
        dim = labels.dim() - 1 - k
        left, right = pads[2 * k], pads[2 * k + 1]
        channels = varies(labels, dim) or (labels.numel() == 1 and dim == 1 and bool(labels.any()))
        if not channels or (left == 0 and right == 0):
            continue
        if not (isinstance(left, int) and isinstance(right, int)) or min(left, right) < 0:
            g.refuse(n, f"{call_name(n)} of the channels by a computed or negative width")
        if argument(n, 2, "mode", "constant") != "constant":  # with copies of channels
            g.joins.pin(labels)
        labels = torch.cat([_zeros(labels, dim, left), labels, _zeros(labels, dim, right)], dim)
    return labels


def _zeros(labels: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """Labels of `width` fixed entries along `dim`, to go beside `labels`."""
    shape = list(labels.shape)
    shape[dim] = width
    return torch.zeros(shape, dtype=torch.long)


def _pixel_shuffle(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    up = name_of(n) == "pixel_shuffle"
    factor = argument(n, 1, "upscale_factor" if up else "downscale_factor")
    return pixel_shuffled(g, n, first(n), value, factor, up)


def _channel_shuffle(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return channel_shuffled(g, n, first(n), argument(n, 1, "groups"))


RULES: dict[str, Rule] = {
    **by_name(
        _moved, "permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze tile repeat_interleave"
    ),
    "repeat": _repeated,
    **by_name(_made, "new_zeros new_ones new_empty new_full"),
    **by_name(_reshape, "view reshape view_as reshape_as"),
    **by_name(_flatten, "flatten ravel"),
    "unflatten": _unflatten,
    **by_name(_expanded, "expand expand_as broadcast_to"),
    "roll": _rolled,
    **by_name(_concatenated, "cat concat concatenate"),
    "stack": _stacked,
    **by_name(_narrowed, "narrow select index_select"),
    "pad": _padded,
    **by_name(_pixel_shuffle, "pixel_shuffle pixel_unshuffle"),
    "channel_shuffle": _channel_shuffle,
}
