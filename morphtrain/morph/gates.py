"""Channel gating: a convolution that reads and writes only some of the channels around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from morphtrain.morph.layers import Gated, ScatterChannels, SelectChannels
from morphtrain.morph.rebind import Change, Rebinder


class Gate(NamedTuple):
    """Positions, among the convolution's present inputs and outputs, of those that stay; None: all of them."""

    reads: torch.Tensor | None = None
    writes: torch.Tensor | None = None


def insert_gate(model: nn.Module, path: str, gate: Gate, rebinder: Rebinder) -> None:
    """Cut the convolution at `path` down to what `gate` leaves, and put the layers beside it that make up for it."""
    convolution: Any = model.get_submodule(path)
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    gated = isinstance(parent, Gated)
    layers = list(parent) if isinstance(parent, Gated) else [convolution]
    if gate.reads is not None:
        rebinder.reindex(convolution, "weight", [Change(1, gate.reads)])
        if isinstance(layers[0], SelectChannels):
            layers[0].index = layers[0].index[gate.reads.to(layers[0].index.device)]
        else:
            layers.insert(0, SelectChannels(gate.reads.to(convolution.weight.device)))
        convolution.in_channels = len(gate.reads)
    if gate.writes is not None:
        rebinder.reindex(convolution, "weight", [Change(0, gate.writes)])
        if convolution.bias is not None:
            rebinder.reindex(convolution, "bias", [Change(0, gate.writes)])
        if isinstance(layers[-1], ScatterChannels):
            layers[-1].index = layers[-1].index[gate.writes.to(layers[-1].index.device)]
        else:
            layers.append(ScatterChannels(gate.writes.to(convolution.weight.device), convolution.out_channels))
        convolution.out_channels = len(gate.writes)
    replacement = Gated(*layers).train(convolution.training)
    if gated:
        place, _, name = parent_path.rpartition(".")
        setattr(model.get_submodule(place), name, replacement)
    else:
        setattr(parent, name, replacement)
