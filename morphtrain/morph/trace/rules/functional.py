"""Layers called as functions (`F.conv2d`, `F.batch_norm`, ...), with parameters that a module holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import along
from morphtrain.morph.trace.nodes import argument, call_name, first, name_of
from morphtrain.morph.trace.rules import weighted
from morphtrain.morph.trace.rules.table import Rule, by_name


def _convolution(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    transposed = "transpose" in name_of(n)
    given = argument(n, 5 if transposed else 6, "groups", 1)
    groups, count = g.concrete(given), g.count(given)
    numbers = [c for a in n.all_input_nodes if a is not given for c in g.counts_of(a)]
    g.need_constant(n, numbers, f"{call_name(n)}, which computes with a number of channels")
    x = g.line(first(n), 1)
    weight = argument(n, 1, "weight")
    depthwise = 1 < groups == len(x) and not (transposed and value.shape[1] != groups)
    if depthwise and count is not None:
        g.fit(x, count)
    elif groups == len(x) or count is not None:
        g.joins.pin(x)  # the number of groups stays
        g.pin_counts([count])
    if depthwise and weight.op != "get_attr" and value.shape[1] == groups:  # a kernel.expand(groups, 1, 3, 3)
        rows = g.labels[weight]
        g.joins.join(x, rows.flatten() if rows.numel() == rows.shape[0] else torch.zeros_like(x))
        return _with_vectors(g, n, along(x, 1, value.dim()), 1, ((2, "bias"),))
    owner, path, name = _weight_of(g, n)
    labels = weighted.convolution(g, owner, path, x, groups, transposed, value, name, bias=None)
    if name in owner._buffers and not depthwise:
        g.joins.pin(x)
        g.joins.pin(labels)
    return _with_vectors(g, n, labels, 1, ((2, "bias"),))


def _linear(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    owner, path, weight = _weight_of(g, n)
    labels = weighted.linear(g, owner, path, g.line(first(n), -1), value, weight, bias=None)
    return _with_vectors(g, n, labels, -1, ((2, "bias"),))


def _batch_norm(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    vectors = ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
    return _with_vectors(g, n, along(g.line(first(n), 1), 1, value.dim()), 1, vectors)


def _layer_norm(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Channels that share their statistics cannot change; neither can the shape, a constant in the code."""
    g.pin_inputs(n)
    return g.labels[first(n)]


def _prelu(g: LabelledGraph, n: fx.Node, value: torch.Tensor) -> torch.Tensor:
    labels = g.labels[first(n)]
    weight = argument(n, 1, "weight")
    return labels if g.values[weight].numel() == 1 else _with_vectors(g, n, labels, 1, ((1, "weight"),))


def _weight_of(g: LabelledGraph, n: fx.Node) -> tuple[nn.Module, str, str]:
    """The module that holds a functional layer's weight, the module's path, and the weight's name."""
    node = argument(n, 1, "weight")
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        g.refuse(n, f"{call_name(n)} with a computed weight")
    path, _, name = str(node.target).rpartition(".")
    owner = g.model.get_submodule(path)
    if name not in owner._parameters and name not in owner._buffers:
        g.refuse(n, f"{call_name(n)} with a weight that is no parameter or buffer")
    return owner, path, name


def _with_vectors(
    g: LabelledGraph, n: fx.Node, labels: torch.Tensor, dim: int, vectors: Iterable[tuple[int, str]]
) -> torch.Tensor:
    """Join the channels in `dim` with the vectors at these arguments of a call."""
    for position, name in vectors:
        node = argument(n, position, name)
        if isinstance(node, fx.Node):
            g.joins.join(labels, along(g.labels[node].flatten(), dim, labels.dim()))
    return labels


RULES: dict[str, Rule] = {
    **by_name(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    "linear": _linear,
    **by_name(_batch_norm, "batch_norm instance_norm"),
    **by_name(_layer_norm, "layer_norm group_norm rms_norm"),
    "prelu": _prelu,
}
