"""Convolutions, linear layers and norms: which dimensions of their tensors hold which channels."""

from __future__ import annotations

import torch
from torch import nn

from morphtrain.morph.spaces import Tensors
from morphtrain.morph.trace.kinds import CONVOLUTIONS, TRANSPOSED
from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import along

NORM_TENSORS = (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))


def convolution(
    g: LabelledGraph,
    m: nn.Module,
    path: str,
    x: torch.Tensor,
    groups: int,
    transposed: bool,
    value: torch.Tensor,
    weight: str = "weight",
    bias: str | None = "bias",
) -> torch.Tensor:
    """Labels of a convolution's output.

    With several groups, channels at the same place in their groups change together, so that all groups stay equally
    wide. With one input channel per group, the outputs follow the inputs, and groups are removed or repeated instead.

    Args:
        m: the owner of the tensors `weight` and `bias`, at `path`.
        x: (I,), the labels of the input channels.
        value: the output.
    """
    dim = value.dim() - getattr(m, weight).dim() + 1
    outputs = value.shape[dim]
    if 1 < groups == len(x) and (not transposed or outputs == groups):
        counter = "groups" if isinstance(m, (*CONVOLUTIONS, *TRANSPOSED)) else None
        g.axis(path, m, weight + " groups", "elementwise", (), x, counter)
        rows = x.repeat_interleave(outputs // groups)
        rows = g.axis(path, m, weight, "elementwise", _rows_of(weight, bias), rows)
        return along(rows, dim, value.dim())
    inputs = x.view(groups, -1)
    g.joins.tie(inputs, 0)
    if transposed:  # weight (I, O/groups, ...)
        g.axis(path, m, weight + " in, transposed", "consumes", ((weight, 0),), x)
        group = g.joins.fresh(outputs // groups)
        g.axis(path, m, weight + " out, transposed", "produces", ((weight, 1),), group)
        rows = g.axis(path, m, weight + " bias, transposed", "elementwise", _rows_of(bias), _spread(g, group, groups))
    else:  # weight (O, I/groups, ...)
        g.axis(path, m, weight + " in", "consumes", ((weight, 1),), inputs[0])
        rows = _spread(g, g.joins.fresh(outputs // groups), groups)
        rows = g.axis(path, m, weight + " out", "produces", _rows_of(weight, bias), rows)
    return along(rows, dim, value.dim())


def linear(
    g: LabelledGraph,
    m: nn.Module,
    path: str,
    x: torch.Tensor,
    value: torch.Tensor,
    weight: str = "weight",
    bias: str | None = "bias",
) -> torch.Tensor:
    """Labels of a linear layer's output; the arguments are those of `convolution`, with features for channels."""
    g.axis(path, m, weight + " in", "consumes", ((weight, 1),), x)
    out = g.joins.fresh(value.shape[-1])
    out = g.axis(path, m, weight + " out", "produces", _rows_of(weight, bias), out)
    return along(out, -1, value.dim())


def norm(g: LabelledGraph, m: nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    """Labels (C,) after a norm of channels `x` (C,).

    Batch norm and instance norm treat each channel by itself. In a group norm, the channels of a group share their
    statistics, so they change together.
    """
    if not isinstance(m, nn.GroupNorm):
        return g.axis(path, m, "channels", "elementwise", NORM_TENSORS, x, "num_features")
    labels = g.axis(path, m, "channels", "elementwise", NORM_TENSORS, x, "num_channels")
    groups = labels.view(m.num_groups, -1)
    g.joins.tie(groups, 1)
    g.axis(path, m, "groups", "elementwise", (), groups[:, 0], "num_groups")
    return labels


def _rows_of(*names: str | None) -> Tensors:
    """Dimension 0 of each of these tensors, which holds a layer's outputs."""
    return tuple((name, 0) for name in names if name is not None)


def _spread(g: LabelledGraph, group: torch.Tensor, groups: int) -> torch.Tensor:
    """(O/groups,) -> (O,): labels of all groups, joined place by place."""
    if groups == 1:
        return group
    rows = g.joins.fresh(len(group) * groups)
    g.joins.join(rows.view(groups, -1), group)
    return rows
