"""Functions and tensor methods that take an activation apart: split, chunk, unbind, index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import compact, full, varies
from morphtrain.morph.trace.nodes import argument, first, name_of
from morphtrain.morph.trace.rules.table import Rule, by_name

SIZES = {"chunk": "chunks", "split": "split_size_or_sections", "tensor_split": "indices_or_sections"}


def _divided(g: LabelledGraph, n: fx.Node, value: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """chunk, split: equal pieces stay equal; a size that is a constant in the code cannot change."""
    x = first(n, "tensor" if name_of(n) == "split" else "input")
    dim = argument(n, 2, "dim", 0) % len(g.shape(x))
    labels: torch.Tensor = g.labels[x]
    if not varies(labels, dim):
        if g.shape(x)[dim] == 1:
            g.joins.pin(labels)
        g.pin_counts(count for a in n.all_input_nodes for count in g.counts_of(a))
        return tuple(labels for _ in value)
    pieces = labels.split([piece.shape[dim] for piece in value], dim)
    _follow_sizes(g, n, labels, pieces, dim)
    return tuple(map(compact, pieces))


def _follow_sizes(g: LabelledGraph, n: fx.Node, labels: torch.Tensor, pieces: Sequence[torch.Tensor], dim: int) -> None:
    """Join channels such that they divide into the same pieces, whatever their number; pin them where they cannot."""
    wanted = argument(n, 1, SIZES[name_of(n)])
    counts = [g.count(w) for w in (wanted if isinstance(wanted, (tuple, list)) else [wanted])]
    equal = len({piece.shape[dim] for piece in pieces}) == 1
    line = labels.numel() == labels.shape[dim]
    if name_of(n) == "chunk" and equal and counts == [None] and len(pieces) == g.concrete(wanted):
        g.joins.tie(labels.unflatten(dim, (len(pieces), -1)), dim)
    elif name_of(n) == "split" and line and isinstance(wanted, (tuple, list)):
        for piece, count in zip(pieces, counts, strict=True):
            g.joins.pin(piece) if count is None else g.fit(piece.flatten(), count)
    elif name_of(n) == "split" and line and equal and counts[0] is not None:
        for piece in pieces:
            g.fit(piece.flatten(), counts[0])
    else:
        g.joins.pin(labels)
        g.pin_counts(counts)


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
    """Pin the channels between a constant bound and the end it is counted from; a computed bound has to fit them.

    An index stays correct if their number does.
    """
    size = labels.shape[dim]
    bounds = [entry.start, entry.stop] if isinstance(entry, slice) else [entry]
    counts = [g.count(bound) for bound in bounds]
    if size == 1:
        g.pin_counts(counts)
        return
    stepped = isinstance(entry, slice) and entry.step not in (None, 1)
    computed = any(isinstance(bound, fx.Node) for bound in bounds)
    if stepped or (computed and (not isinstance(entry, slice) or labels.numel() != size)):
        g.joins.pin(labels)
        g.pin_counts(counts)
        return
    for bound, count in zip(bounds, counts, strict=True):
        if bound is None:
            continue
        number = g.concrete(bound) + (not isinstance(entry, slice) and bound >= 0)
        start = 0 if number >= 0 else max(size + number, 0)
        before = labels.narrow(dim, start, min(abs(number), size))
        if count is None:
            g.joins.pin(before)
        else:
            g.fit(before.flatten(), count if number >= 0 else count.times(Fraction(-1)))


RULES: dict[str, Rule] = {
    **by_name(_divided, "chunk split tensor_split"),
    "unbind": _unbound,
    "getitem": _indexed,
}
