"""Layers of the user's own that declare `per_channel = True`: each output channel comes from the same input channel."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from morphtrain.morph.surgery.widths import ALL_WIDTHS
from morphtrain.morph.trace.kinds import NORMS
from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import along
from morphtrain.morph.trace.recording import FAILURES
from morphtrain.morph.trace.traced import SAMPLES


def declares_it(module: nn.Module) -> bool:
    """Whether the rule of this module is for a layer; norms derived from torch's have their own."""
    return getattr(module, "per_channel", False) is True and not isinstance(module, NORMS)


def follow(g: LabelledGraph, n: fx.Node, m: nn.Module, x: fx.Node, value: Any) -> torch.Tensor:
    """Labels of the output; refused if the declaration does not hold.

    Channels are in dimension 1. The layer's own parameters and buffers have them in dimension 0, or are of one entry;
    an attribute with the name of a width (`channels`, `num_features`) that is their number changes with it.
    """
    said = f"module {type(m).__name__}, which declares per_channel,"
    shape = g.shape(x)
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[:2] != shape[:2]:
        g.refuse(n, f"{said} but changes the number of channels")
    tensors = {**dict(m.named_parameters()), **dict(m.named_buffers())}
    held = [name for name, tensor in tensors.items() if tensor.dim() > 0 and tensor.shape[0] == shape[1]]
    if wrong := [name for name, tensor in tensors.items() if (name not in held and tensor.numel() > 1) or "." in name]:
        g.refuse(n, f"{said} but whose {wrong[0]} does not hold its {shape[1]} channels in dimension 0")
    width = next((name for name in ALL_WIDTHS if vars(m).get(name) == shape[1]), None)
    if not any(tensor.is_meta for tensor in tensors.values()) and not _holds(m, shape, held, width):
        g.refuse(n, f"{said} but computes something else with every second channel alone")
    labels = g.axis(str(n.target), m, "channels", "elementwise", tuple((name, 0) for name in held), g.line(x, 1), width)
    return along(labels, 1, value.dim())


def _holds(m: nn.Module, shape: Sequence[int], held: Sequence[str], width: str | None) -> bool:
    """Whether the layer with every second channel computes these channels of what it computes with all of them."""
    first = next((tensor for tensor in m.parameters()), torch.empty(0))
    random = torch.Generator().manual_seed(0)

    def drawn(size: Sequence[int]) -> torch.Tensor:
        return torch.randn(size, generator=random).to(first.device, first.dtype)

    whole = copy.deepcopy(m).eval()
    for name in held:
        tensor = getattr(whole, name)
        if tensor.is_floating_point():
            tensor.data = tensor.data + drawn(tensor.shape).abs()  # new ones are often all equal
    part = copy.deepcopy(whole)
    for name in held:
        getattr(part, name).data = getattr(part, name).data[::2]
    if width is not None:
        setattr(part, width, len(range(0, shape[1], 2)))
    images = drawn((SAMPLES, *shape[1:]))
    try:
        return torch.allclose(whole(images)[:, ::2], part(images[:, ::2]), rtol=1e-3, atol=1e-4, equal_nan=True)
    except FAILURES:
        return False
