"""Functions and tensor methods that take an activation apart: split, chunk, unbind, index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import compact, full, varies
from morphtrain.morph.trace.nodes import argument, first, name_of
from morphtrain.morph.trace.rules.table import Rule, by_name


def _divided(g: LabelledGraph, n: fx.Node, value: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """chunk, split: equal pieces stay equal; a size that is a constant in the code cannot change."""
    x = first(n, "tensor" if name_of(n) == "split" else "input")
    dim = argument(n, 2, "dim", 0) % len(g.shape(x))
    labels: torch.Tensor = g.labels[x]
    if not varies(labels, dim):
        if g.shape(x)[dim] == 1:
            g.joins.pin(labels)
        return tuple(labels for _ in value)
    sizes = [piece.shape[dim] for piece in value]
    wanted = argument(n, 1, "split_size_or_sections")
    wanted = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted]
    follows = name_of(n) == "chunk" or all(isinstance(w, fx.Node) and g.is_width(w) for w in wanted)
    if len(set(sizes)) == 1 and follows:
        g.joins.tie(labels.unflatten(dim, (len(sizes), sizes[0])), dim)
    else:
        g.joins.pin(labels)
    return tuple(compact(piece) for piece in labels.split(sizes, dim))


def _unbound(g: LabelledGraph, n: fx.Node, value: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    x = first(n)
    dim = argument(n, 1, "dim", 0) % len(g.shape(x))
    g.pin_varying(x, [dim])
    return tuple(compact(piece) for piece in full(g.labels[x], g.shape(x)).unbind(dim))


def _indexed(g: LabelledGraph, n: fx.Node, value: Any) -> Any:
    """x[...]: an element of a tuple, or slices and positions; channels before a constant bound cannot change."""
    x, index = n.args[0], n.args[1]
    assert isinstance(x, fx.Node)
    labels = g.labels[x]
    if not isinstance(labels, torch.Tensor):
        if isinstance(index, fx.Node):
            g.refuse(n, "an index that is computed")
        return labels[index]
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(e, (fx.Node, list, torch.Tensor)) for e in entries):
        g.refuse(n, "an index that is computed, or a list")
    shape = g.shape(x)
    for dim, entry in _by_dimension(entries, len(shape)):
        if dim < len(shape) and entry != slice(None):
            _pin_to_bounds(g, labels, dim, entry)
    return compact(full(labels, shape)[g.concrete(index)])


def _by_dimension(entries: Sequence[Any], rank: int) -> Iterator[tuple[int, Any]]:
    """(dimension, entry) for the entries of an index that apply to a dimension."""
    consumed = sum(1 for e in entries if e is not None and e is not Ellipsis)
    dim = 0
    for entry in entries:
        if entry is Ellipsis:
            dim += rank - consumed
        elif entry is not None:
            yield dim, entry
            dim += 1


def _pin_to_bounds(g: LabelledGraph, labels: torch.Tensor, dim: int, entry: Any) -> None:
    """Pin the channels between a constant bound and the end it is counted from.

    An index stays correct if their number does. A slice to or from the computed middle ties the halves instead.
    """
    size = labels.shape[dim]
    if size == 1:
        return
    bounds = [entry.start, entry.stop] if isinstance(entry, slice) else [entry]
    if isinstance(entry, slice) and entry.step not in (None, 1):
        g.joins.pin(labels)
    elif any(isinstance(b, fx.Node) for b in bounds):
        if all(b is None or (isinstance(b, fx.Node) and g.is_width(b) and 2 * g.values[b] == size) for b in bounds):
            g.joins.tie(labels.unflatten(dim, (2, size // 2)), dim)
        else:
            g.joins.pin(labels)
    else:
        for bound in bounds:
            if bound is not None and bound >= 0:
                g.joins.pin(labels.narrow(dim, 0, min(bound + (not isinstance(entry, slice)), size)))
            elif bound is not None:
                g.joins.pin(labels.narrow(dim, max(size + bound, 0), min(-bound, size)))


RULES: dict[str, Rule] = {
    **by_name(_divided, "chunk split tensor_split"),
    "unbind": _unbound,
    "getitem": _indexed,
}
