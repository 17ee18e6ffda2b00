"""Channels on their way out: what makes, passes on and uses them becomes zero step by step, until they are cut out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.optim import Optimizer

from morphtrain.morph import MIXING, NORMS, Axis, ChannelGraph, MorphError, Space, ZeroBranch
from morphtrain.morph.effective import effective, parameters_of
from morphtrain.prune.reconfigure import Reconfiguration
from morphtrain.prune.weights import Weight, multiply, weight_of

NOTHING = 1e-6  # epochs: less than a step, and more than what rounding adds up to in an epoch


class Fading:
    """Scales chosen channels down, linearly over a time, and removes them at its end.

    A channel is everything of it: rows of the weights that make it, scales and shifts of its norms, its biases, columns
    of the weights that use it. Each step takes the norm of it all / (steps that are left), whatever training does to it
    meanwhile. So it is zero at the end, with any network, learning rate and number of steps, and the cut changes
    nothing. What the channel added, its constants too, the others have had time to take over. They are not touched.

    A penalty that grows on chosen weights only is growing regularisation (Wang et al. 2021, arXiv 2012.09243); one that
    arrives at zero in time is HESSO's (Chen et al. 2024, arXiv 2409.09085).

    Args:
        graph: the network, as long as its structure stays.
        gone: masks (size,) of the channels that go, of some of the spaces.
        left: epochs until they are to be zero.
    """

    def __init__(self, graph: ChannelGraph, gone: Mapping[Space, torch.Tensor], left: float) -> None:
        self.graph, self.left = graph, left
        self.gone = {space: mask for space, mask in gone.items() if bool(mask.any())}
        masks: dict[Weight, torch.Tensor] = {}
        for axis in graph.axes:
            entries = _entries(axis, self.gone)
            if not _can_fade(axis) or not bool(entries.any()):
                continue
            for name, dim in axis.tensors:
                if parameters_of(axis.module, name):
                    weight, tensor = weight_of(axis.module, name), effective(axis.module, name)
                    mask = entries.to(tensor.device).view([-1 if d == dim else 1 for d in range(tensor.dim())])
                    masks[weight] = mask | masks[weight] if weight in masks else mask
        self.masks = masks  # each spreads over its weight

    @torch.no_grad()
    def fade(self, left: float) -> None:
        """Scale the channels down to where they have to be when `left` epochs are left."""
        left = left if left > NOTHING else 0.0
        factor = min(left / self.left, 1.0) if self.left else 0.0
        for weight, mask in self.masks.items():
            with suppress(MorphError):  # computed, and cannot be this: it stays until what else the channel is has gone
                multiply(weight, torch.where(mask, factor, 1.0))
        self.left = left

    def cut(self, optimizer: Optimizer) -> Reconfiguration:
        """Remove the channels; if they are not zero yet, they are now."""
        self.fade(0.0)
        widths = {space.name: (space.size, int((~mask).sum())) for space, mask in self.gone.items()}
        self.graph.reindex_spaces({s: (~mask).nonzero().flatten() for s, mask in self.gone.items()}, optimizer)
        return Reconfiguration(widths)

    def state_dict(self) -> dict[str, Any]:
        return {"gone": {space.name: mask for space, mask in self.gone.items()}, "left": self.left}


def resumed(graph: ChannelGraph, state: Mapping[str, Any]) -> Fading:
    """What `state_dict` was of, on the same network."""
    return Fading(graph, {graph.space(name): mask for name, mask in state["gone"].items()}, state["left"])


def _can_fade(axis: Axis) -> bool:
    """Whether the tensors of an axis may be zero. Other layers that pass channels on might divide by theirs."""
    return axis.role != "elementwise" or isinstance(axis.module, (*MIXING, *NORMS, ZeroBranch))


def _entries(axis: Axis, gone: Mapping[Space, torch.Tensor]) -> torch.Tensor:
    """Mask (length,) of the entries of channels that go."""
    mask = torch.zeros(axis.length, dtype=torch.bool)
    for start, segment in axis.placed():
        if segment.space is not None and segment.space in gone:
            mask[start : start + segment.length] = gone[segment.space].repeat_interleave(segment.span)
    return mask
