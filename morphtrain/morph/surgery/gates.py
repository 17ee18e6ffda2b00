"""Channel gating: a convolution that reads and writes only some of the channels around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from morphtrain.morph.layers import Gated, ScatterChannels, SelectChannels
from morphtrain.morph.surgery.architecture import refresh_widths
from morphtrain.morph.surgery.rebind import Change, Rebinder


class Gate(NamedTuple):
    """Positions, among the convolution's present inputs and outputs, of those that stay; None: all of them."""

    reads: torch.Tensor | None = None
    writes: torch.Tensor | None = None


def insert_gate(model: nn.Module, path: str, gate: Gate, rebinder: Rebinder) -> None:
    """Cut the convolution at `path` down to what `gate` leaves, and put the layers beside it that make up for it.

    One that writes less must have no bias, which would be lost where it no longer writes.
    """
    convolution: Any = model.get_submodule(path)
    parent_path = path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    place, layers = (parent_path, list(parent)) if isinstance(parent, Gated) else (path, [convolution])
    device, changes = convolution.weight.device, []
    if gate.reads is not None:
        changes.append(Change(1, gate.reads))
        if isinstance(layers[0], SelectChannels):
            layers[0].index = layers[0].index[gate.reads.to(device)]
        else:
            layers.insert(0, SelectChannels(gate.reads.to(device)))
    if gate.writes is not None:
        changes.append(Change(0, gate.writes))
        if isinstance(layers[-1], ScatterChannels):
            layers[-1].index = layers[-1].index[gate.writes.to(device)]
        else:
            layers.append(ScatterChannels(gate.writes.to(device), convolution.out_channels))
    rebinder.reindex(convolution, "weight", changes)
    refresh_widths(convolution)
    model.set_submodule(place, Gated(*layers).train(convolution.training))
