"""What a trace found: the calls of a network, the labels of its activations, and the axes of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from morphtrain.morph.spaces import Role, Tensors

SAMPLES = 2  # in the traced batch: one sample could be mistaken for a dimension of size 1

OUTPUT = "the network's output"  # why the last layer keeps its channels

Shared = Mapping[tuple[int, str], Sequence[tuple[nn.Module, str]]]  # (id of module, tensor name) -> its other names


@dataclass(eq=False)
class TracedAxis:
    """A dimension of a module's tensors, with the label of the channel that each of its entries belongs to.

    `two_sided`: whether one layer makes or passes on these channels with a tensor by which another uses them.
    `narrowing`: whether its weight is computed such that channels can go, but none can be repeated.
    """

    path: str
    module: nn.Module
    role: Role
    tensors: Tensors
    labels: torch.Tensor
    counter: str | None = None  # the module's attribute that holds this axis' length
    two_sided: bool = False
    narrowing: bool = False


@dataclass(eq=False)
class TracedGather:
    """A module whose `index` lists the entries of axis `source` that make up axis `gathered`."""

    module: nn.Module
    source: TracedAxis
    gathered: TracedAxis


@dataclass
class Trace:
    """A network as the propagator saw it.

    Args:
        nodes: the calls in training mode, in the order of execution; `meta["shape"]` of those that give a tensor.
        evaluation: the same of evaluation mode; often the same nodes.
        axes: in the order of use.
        gathers: the modules that select or scatter channels by an index.
        labels: those of each node's tensor; for a tuple of tensors, a tuple of labels.
        roots: label -> smallest label of its class.
        shared: tensors that several modules hold.
        kept: by the path of a layer that makes channels which cannot change: how many, and why.
        odd_calls: the paths of modules that are not called with one argument, as a Sequential is.
        activations: what comes last in layers that are a norm with an activation, by its name.
    """

    nodes: list[fx.Node]
    evaluation: list[fx.Node]
    axes: list[TracedAxis]
    gathers: list[TracedGather]
    labels: dict[fx.Node, Any]
    roots: torch.Tensor
    shared: Shared
    kept: dict[str, str]
    odd_calls: Collection[str]
    activations: Mapping[nn.Module, str]
