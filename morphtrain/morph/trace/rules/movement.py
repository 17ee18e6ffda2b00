"""How functions and tensor methods that move channels do so: reshape, permute, concatenate, split, index, pad.

Where a size that holds channels is a constant in the model's code, these channels are kept. Where the code computes
it (from a shape, or as -1), it follows a change; then the constants beside it say what has to change together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from morphtrain.morph.trace.labels import along, compact, fixed, full, varies
from morphtrain.morph.trace.nodes import argument, describe, dimensions, first, name_of

if TYPE_CHECKING:
    from morphtrain.morph.trace.propagator import Propagator

Rule = Callable[["Propagator", fx.Node, Any], Any]


def reshaped(p: Propagator, x: fx.Node, value: torch.Tensor, sizes: Sequence[Any]) -> torch.Tensor:
    """Labels behind a view or reshape to `sizes`: numbers, or nodes that compute them."""
    shape = p.shape(x)
    labels = full(p.labels[x], shape).reshape(value.shape)
    for into, out in matching_dims(shape, value.shape):
        if not any(varies(p.labels[x], d) for d in into):
            continue
        follows = [d for d in out if sizes[d] == -1 or (isinstance(sizes[d], fx.Node) and p.is_width(sizes[d]))]
        if not follows:
            p.joins.keep(compact(labels))
        for d in out:
            if d not in follows:
                p.joins.tie(labels, d)
    return compact(labels)


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


def flattened(p: Propagator, x: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Labels behind a flatten: a merged dimension follows whatever changes in it."""
    return reshaped(p, x, value, [-1] * value.dim())


def pixel_shuffled(p: Propagator, n: fx.Node, x: fx.Node, value: torch.Tensor, factor: int, up: bool) -> torch.Tensor:
    """Labels behind (C*r*r, H, W) -> (C, H*r, W*r) and back: r*r neighbouring channels are one."""
    line = p.line(n, x, -3)
    if up:
        groups = line.view(-1, factor * factor)
        p.joins.tie(groups, 1)
        return along(groups[:, 0], -3, value.dim())
    return along(line.repeat_interleave(factor * factor), -3, value.dim())


def channel_shuffled(p: Propagator, n: fx.Node, x: fx.Node, groups: int) -> torch.Tensor:
    """Labels behind a channel shuffle: the groups stay equally wide."""
    line = p.line(n, x, 1).view(groups, -1)
    p.joins.tie(line, 0)
    return along(line.t().flatten(), 1, len(p.shape(x)))


def _moved(p: Propagator, n: fx.Node, value: Any) -> Any:
    """permute, transpose, unsqueeze, ...: the same operation moves the labels."""
    x = first(n)
    labels = full(p.labels[x], p.shape(x))
    rest = p.concrete(n.args[1:])
    if n.op == "call_method":
        moved = getattr(labels, str(n.target))(*rest, **p.concrete(n.kwargs))
    else:
        moved = n.target(labels, *rest, **{k: p.concrete(v) for k, v in n.kwargs.items() if k != "input"})  # type: ignore[operator]
    return compact(moved)


def _reshape(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    sizes = list(n.args[1:]) or list(n.kwargs.values())[:1]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    if len(sizes) != value.dim() or any(isinstance(p.concrete(size), torch.Size) for size in sizes):
        p.refuse(n, f"{describe(n)} to the shape of another tensor")
    return reshaped(p, first(n), value, sizes)


def _flatten(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return flattened(p, first(n), value)


def _unflatten(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    dim = argument(n, 1, "dim") % len(p.shape(x))
    sizes: list[Any] = list(p.shape(x))
    sizes[dim : dim + 1] = list(argument(n, 2, "sizes"))
    return reshaped(p, x, value, sizes)


def _expanded(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    labels: torch.Tensor = p.labels[x]
    rank = value.dim()
    labels = labels.view([1] * (rank - labels.dim()) + list(labels.shape))
    shape = [1] * (rank - len(p.shape(x))) + list(p.shape(x))
    if labels.numel() == 1 and any(size == 1 != wide for size, wide in zip(shape[1:], value.shape[1:], strict=True)):
        p.joins.keep(labels)  # one channel that becomes several
    return labels


def _rolled(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    if p.keep_varying(first(n), dimensions(argument(n, 2, "dims"), value.dim())):
        return fixed(value.dim())
    labels: torch.Tensor = p.labels[first(n)]
    return labels


def _concatenated(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    parts = list(argument(n, 0, "tensors"))
    return joined_along(p, parts, argument(n, 1, "dim", 0) % value.dim(), value)


def joined_along(p: Propagator, parts: Sequence[fx.Node], dim: int, value: torch.Tensor) -> torch.Tensor:
    """Labels of a concatenation: side by side if the channels are in `dim`, else joined."""
    labels = [p.labels[part] for part in parts]
    elsewhere = any(varies(label, d) for label in labels for d in range(value.dim()) if d != dim)
    if elsewhere and not any(varies(label, dim) for label in labels):
        for label in labels[1:]:
            p.joins.join(labels[0], label)
        return max(labels, key=torch.Tensor.numel)
    shape = [max(label.shape[d] for label in labels) for d in range(value.dim())]
    wide = []
    for part, label in zip(parts, labels, strict=True):
        shape[dim] = p.shape(part)[dim]
        wide.append(label.expand(shape))
    return compact(torch.cat(wide, dim))


def _stacked(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Activations of one shape in a new dimension: channel by channel they are one."""
    parts = list(argument(n, 0, "tensors"))
    labels = [p.labels[part].unsqueeze(argument(n, 1, "dim", 0)) for part in parts]
    for label in labels[1:]:
        p.joins.join(labels[0], label)
    return max(labels, key=torch.Tensor.numel)


def _divided(p: Propagator, n: fx.Node, value: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """chunk, split: pieces of one size stay of one size; a size that is a constant in the code is kept."""
    x = first(n, "tensor" if name_of(n) == "split" else "input")
    dim = argument(n, 2, "dim", 0) % len(p.shape(x))
    labels: torch.Tensor = p.labels[x]
    if not varies(labels, dim):
        if p.shape(x)[dim] == 1:
            p.joins.keep(labels)
        return tuple(labels for _ in value)
    sizes = [piece.shape[dim] for piece in value]
    wanted = argument(n, 1, "split_size_or_sections")
    wanted = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted]
    follows = name_of(n) == "chunk" or all(isinstance(w, fx.Node) and p.is_width(w) for w in wanted)
    if len(set(sizes)) == 1 and follows:
        p.joins.tie(labels.unflatten(dim, (len(sizes), sizes[0])), dim)
    else:
        p.joins.keep(labels)
    return tuple(compact(piece) for piece in labels.split(sizes, dim))


def _unbound(p: Propagator, n: fx.Node, value: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    x = first(n)
    dim = argument(n, 1, "dim", 0) % len(p.shape(x))
    p.keep_varying(x, [dim])
    return tuple(compact(piece) for piece in full(p.labels[x], p.shape(x)).unbind(dim))


def _indexed(p: Propagator, n: fx.Node, value: Any) -> Any:
    """x[...]: an element of a tuple, or slices and positions; channels in front of a constant bound stay."""
    x, index = n.args[0], n.args[1]
    assert isinstance(x, fx.Node)
    labels = p.labels[x]
    if not isinstance(labels, torch.Tensor):
        if isinstance(index, fx.Node):
            p.refuse(n, "an index that is computed")
        return labels[index]
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(e, (fx.Node, list, torch.Tensor)) for e in entries):
        p.refuse(n, "an index that is computed, or a list")
    shape = p.shape(x)
    consumed = sum(1 for e in entries if e is not None and e is not Ellipsis)
    dim = 0
    for entry in entries:
        if entry is Ellipsis:
            dim += len(shape) - consumed
        elif entry is not None:
            if dim < len(shape) and entry != slice(None):
                _keep_to_bound(p, labels, dim, entry)
            dim += 1
    return compact(full(labels, shape)[p.concrete(index)])


def _keep_to_bound(p: Propagator, labels: torch.Tensor, dim: int, entry: Any) -> None:
    """An index is right after a change if as many channels as before lie in front of its bounds."""
    size = labels.shape[dim]
    if size == 1:
        return
    bounds = [entry] if not isinstance(entry, slice) else [entry.start, entry.stop]
    computed = [b for b in bounds if isinstance(b, fx.Node)]
    if isinstance(entry, slice) and entry.step not in (None, 1):
        p.joins.keep(labels)
    elif computed:
        halves = isinstance(entry, slice) and all(
            b is None or (isinstance(b, fx.Node) and p.is_width(b) and 2 * p.env[b] == size) for b in bounds
        )
        if halves:
            p.joins.tie(labels.unflatten(dim, (2, size // 2)), dim)
        else:
            p.joins.keep(labels)
    else:
        for bound in bounds:
            if bound is not None and bound >= 0:
                p.joins.keep(labels.narrow(dim, 0, min(bound + (not isinstance(entry, slice)), size)))
            elif bound is not None:
                p.joins.keep(labels.narrow(dim, max(size + bound, 0), min(-bound, size)))


def _narrowed(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    x = first(n)
    p.keep_varying(x, [argument(n, 1, "dim")])
    return _moved(p, n, value)


def _padded(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Zeros beside the channels are as many as the code says: they stay, and so does what is added to them."""
    x = first(n)
    labels: torch.Tensor = p.labels[x]
    pads = argument(n, 1, "pad")
    rank = labels.dim()
    for k in range(len(pads) // 2):
        dim = rank - 1 - k
        left, right = pads[2 * k], pads[2 * k + 1]
        channels = varies(labels, dim) or (labels.numel() == 1 and dim == 1 and bool(labels.any()))
        if not channels or (left == 0 and right == 0):
            continue
        if not (isinstance(left, int) and isinstance(right, int)) or min(left, right) < 0:
            p.refuse(n, f"{describe(n)} of the channels by a computed or negative width")
        shape = list(labels.shape)
        sides = []
        for width in (left, right):
            shape[dim] = width
            sides.append(torch.zeros(shape, dtype=torch.long))
        labels = torch.cat([sides[0], labels, sides[1]], dim)
    return labels


def _pixel_shuffle(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    up = name_of(n) == "pixel_shuffle"
    factor = argument(n, 1, "upscale_factor" if up else "downscale_factor")
    return pixel_shuffled(p, n, first(n), value, factor, up)


def _channel_shuffle(p: Propagator, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    return channel_shuffled(p, n, first(n), argument(n, 1, "groups"))


def by_name(rule: Rule, names: str) -> dict[str, Rule]:
    """The same rule under several names."""
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **by_name(
        _moved, "permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze repeat tile repeat_interleave"
    ),
    **by_name(_reshape, "view reshape"),
    **by_name(_flatten, "flatten ravel"),
    "unflatten": _unflatten,
    **by_name(_expanded, "expand expand_as broadcast_to"),
    "roll": _rolled,
    **by_name(_concatenated, "cat concat concatenate"),
    "stack": _stacked,
    **by_name(_divided, "chunk split tensor_split"),
    "unbind": _unbound,
    "getitem": _indexed,
    **by_name(_narrowed, "narrow select index_select"),
    "pad": _padded,
    **by_name(_pixel_shuffle, "pixel_shuffle pixel_unshuffle"),
    "channel_shuffle": _channel_shuffle,
}

TAKES_WIDTHS = frozenset(
    ["view", "reshape", "unflatten", "expand", "expand_as", "broadcast_to", "split", "tensor_split", "chunk", "getitem"]
)
