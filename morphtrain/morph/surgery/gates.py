"""Channel gating: a convolution that reads and writes only some of the channels around it (Lym et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from morphtrain.morph.effective import effective
from morphtrain.morph.errors import MorphError
from morphtrain.morph.layers import Gated, ScatterChannels, SelectChannels
from morphtrain.morph.surgery.change import Change
from morphtrain.morph.surgery.computed import Replacement
from morphtrain.morph.surgery.rebind import Rebinder
from morphtrain.morph.surgery.widths import refresh_widths
from morphtrain.morph.trace.kinds import CONVOLUTIONS


class Gate(NamedTuple):
    """What a gated convolution keeps: positions among its present input and output channels; None keeps all."""

    reads: torch.Tensor | None = None
    writes: torch.Tensor | None = None


def planned_gates(
    modules: Mapping[str, nn.Module], gates: Mapping[str, Gate], rebinder: Rebinder
) -> dict[str, list[Replacement]]:
    """By path, what has to be replaced in the convolution itself; nothing is yet.

    Raises:
        MorphError: for a gate that cannot be inserted. A convolution that is to write fewer channels must have no bias,
            which would be lost where it no longer writes.
    """
    planned = {}
    for path, gate in gates.items():
        module = modules.get(path)
        if not isinstance(module, CONVOLUTIONS) or module.groups != 1:
            raise MorphError(f"'{path}' cannot be gated: it is not a convolution of one group")
        if gate.writes is not None and module.bias is not None:
            raise MorphError(f"'{path}' cannot be gated: its bias would be lost where it no longer writes")
        sides = ((1, gate.reads), (0, gate.writes))
        changes = [Change(dim, kept) for dim, kept in sides if kept is not None]
        planned[path] = rebinder.planned(path, module, "weight", changes)
    return planned


def insert_gate(model: nn.Module, path: str, gate: Gate, planned: Sequence[Replacement], rebinder: Rebinder) -> None:
    """Cut the convolution at `path` down to what `gate` keeps, and put select and scatter layers around it."""
    convolution: Any = model.get_submodule(path)
    parent_path = path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    place, layers = (parent_path, list(parent)) if isinstance(parent, Gated) else (path, [convolution])
    device = effective(convolution).device
    if gate.reads is not None:
        if isinstance(layers[0], SelectChannels):
            layers[0].index = layers[0].index[gate.reads.to(device)]
        else:
            layers.insert(0, SelectChannels(gate.reads.to(device)))
    if gate.writes is not None:
        if isinstance(layers[-1], ScatterChannels):
            layers[-1].index = layers[-1].index[gate.writes.to(device)]
        else:
            layers.append(ScatterChannels(gate.writes.to(device), convolution.out_channels))
    for replacement in planned:
        rebinder.reindex(replacement)
    refresh_widths(convolution)
    model.set_submodule(place, Gated(*layers).train(convolution.training))
