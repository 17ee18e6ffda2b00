"""How much channels matter: what is lost with each, in amounts that add up (`prune.importance`).

    lost = {space: rising(found) for space, found in magnitude(graph).items()}
    keep = within(graph, lost, cost, budget)

Layers of any size and scale have to compare. So `magnitude` and `gamma` count in layers: a channel has a share of every
weight (or norm) that it goes through, and the shares of one add up to one. `Taylor` counts in squared changes of the
loss.

All of them give (size,) of every space, on the CPU; infinite where they cannot tell, so that these channels stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from morphtrain.morph import NORMS, Axis, ChannelGraph, Space, exact

Importance = dict[Space, torch.Tensor]


def magnitude(graph: ChannelGraph) -> Importance:
    """The channel's shares of the squares of the weights that make or use it, added up over these weights."""
    return _of_all(graph, _per_channel(graph, lambda axis: _shares(axis.weight, axis.dim) if axis.tensors else None))


def gamma(graph: ChannelGraph) -> Importance:
    """The channel's shares of the squared scales of the norms that it goes through, added up over these norms."""
    return _of_all(graph, _per_channel(graph, lambda axis: _shares(_scale(axis), 0)))


class Taylor:
    """The squared change of the loss without a channel, to first order, as the mean over training steps.

    A gate on whatever reads a channel has the derivative sum of gradient * weight, over these weights (Molchanov et al.
    2019, arXiv 1906.10771, section 3). The gradients are those of training, so that it costs no pass of its own.

    Attributes:
        sums: of the squares, by the names of the spaces: (size,), on the model's device.
        steps: how many steps they are of.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0
        self._seen: dict[str, torch.Tensor] = {}

    def look(self, graph: ChannelGraph) -> None:
        """Look at the gradients of a step, and at the weights before it."""
        self._seen = {space.name: found.square() for space, found in _per_channel(graph, _derivative).items()}

    def count(self) -> None:
        """The step was taken: what was last seen counts."""
        for name, seen in self._seen.items():
            self.sums[name] = self.sums[name] + seen if name in self.sums else seen
        self.steps += bool(self._seen)
        self._seen = {}

    def importance(self, graph: ChannelGraph) -> Importance:
        """Infinite for what a frozen layer reads, which has no gradient; before the first step, all matter alike."""
        means = {
            space: self.sums.get(space.name, torch.zeros(space.size)) / self.steps
            if self.steps
            else torch.ones(space.size)
            for space in graph.spaces
            if _has_gradients(space)
        }
        return _of_all(graph, means)

    def to(self, device: torch.device) -> None:
        """Move the sums."""
        self.sums = {name: found.to(device) for name, found in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.steps = dict(state["sums"]), state["steps"]


def rising(importance: torch.Tensor) -> torch.Tensor:
    """What goes with each channel of a space once all that matter less have gone: S * log(s / (s - r)), (size,).

    Here r is the channel's importance, s the sum that those before it have left, S that of the whole space. By r alone
    a thin layer would be thinned out as readily as a wide one, and an expensive layer would lose all that it can. These
    amounts begin as r. They add up to S * log(S / s), which has no limit, so that no layer is emptied; and layers of
    channels that matter alike, at costs alike, lose the same share.

    Args:
        importance: of each channel of a space, (size,); unchanged if some are infinite.
    """
    if not bool(importance.isfinite().all()):
        return importance
    order = importance.argsort(stable=True)
    left = importance[order].flip(0).cumsum(0).flip(0)  # of the channel and all that matter more
    rest = torch.cat([left[1:], left.new_zeros(1)])
    amounts = torch.where(left > 0, left[0] * (importance[order] / rest).log1p(), 0.0)
    return torch.empty_like(amounts).scatter_(0, order, amounts)


@torch.no_grad()
def _per_channel(graph: ChannelGraph, of_axis: Callable[[Axis], torch.Tensor | None]) -> dict[Space, torch.Tensor]:
    """(size,): the sum over a space's slots of what `of_axis` says of the entries of their axes.

    Spaces of which it says nothing are left out. A tensor that several layers share is on the axes of one of them.
    """
    sums: dict[Space, torch.Tensor] = {}
    for axis in graph.axes:
        entries = of_axis(axis)
        if entries is None:
            continue
        for start, segment in axis.placed():
            if segment.space is not None:
                found = entries[start : start + segment.length].view(-1, segment.span).sum(1)
                sums[segment.space] = sums[segment.space] + found if segment.space in sums else found
    return sums


def _of_all(graph: ChannelGraph, found: Mapping[Space, torch.Tensor]) -> Importance:
    """In double precision, and infinite for the spaces that were not found."""
    unknown = {space: torch.full((space.size,), torch.inf, dtype=torch.double) for space in graph.spaces}
    return unknown | {space: values.cpu().double() for space, values in found.items()}


def _shares(weight: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    """(length,): of each entry along `dim`, its share of the squares of a weight."""
    if weight is None:
        return None
    squares = _summed(exact(weight).square(), dim)
    return squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)


def _summed(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The sums over all dimensions but one."""
    others = [other for other in range(values.dim()) if other != dim]
    return values.sum(others) if others else values


def _scale(axis: Axis) -> torch.Tensor | None:
    """The weight of a norm; None for any other axis."""
    if axis.role != "elementwise" or not isinstance(axis.module, NORMS) or axis.tensors[:1] != (("weight", 0),):
        return None
    scale: torch.Tensor = getattr(axis.module, axis.tensors[0][0])
    return scale


def _derivative(axis: Axis) -> torch.Tensor | None:
    """(length,): of the loss, by a gate on each entry that is read along this axis; None where no weight reads."""
    if axis.role != "consumes" or axis.weight is None:
        return None
    gradient = axis.weight.grad
    if gradient is None:
        return axis.weight.new_zeros(axis.length)  # frozen, or the loss does not depend on it
    return _summed(exact(gradient) * exact(axis.weight), axis.dim)


def _has_gradients(space: Space) -> bool:
    """Whether weights read the space, and all of these are trained."""
    weights = [slot.axis.weight for slot in space.slots if slot.role == "consumes" and slot.has_weights]
    return bool(weights) and all(weight is not None and weight.requires_grad for weight in weights)
