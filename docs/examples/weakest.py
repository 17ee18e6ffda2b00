"""A pruning method of one's own: every few epochs the channels with the smallest weights go."""

from __future__ import annotations

from typing import Any

import torch

from morphtrain.method import Method
from morphtrain.morph import Space
from morphtrain.state import Run


class Weakest(Method):
    """Remove `share` of the channels of every space after every `interval` epochs, `times` times in all."""

    follows_channels = True  # a network whose channels cannot be followed is refused

    def __init__(self, share: float, interval: int, times: int) -> None:
        self.share, self.interval, self.times = share, interval, times
        self.done = 0

    def after_epoch(self, run: Run) -> None:
        if run.epoch % self.interval or self.done == self.times:
            return
        before = sum(space.size for space in run.graph.spaces)
        kept = {space: strongest(space, round(space.size * (1 - self.share))) for space in run.graph.spaces}
        run.graph.reindex_spaces(kept, run.optimizer)
        self.done += 1
        after = sum(space.size for space in run.graph.spaces)
        run.shape_changed(f"removed the weakest {before - after} of {before} channels")

    def measure(self, run: Run) -> dict[str, float]:
        return {"narrowest": min(space.size for space in run.graph.spaces)}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def strongest(space: Space, count: int) -> torch.Tensor:
    """(count,): the channels with the largest sums of |w| over the layers that make them, in order."""
    total = torch.zeros(space.size)
    for slot in space.slots:
        weight = slot.axis.weight
        if slot.role == "produces" and weight is not None:
            entries = slice(slot.start, slot.start + space.size * slot.segment.span)
            rows = weight.detach().abs().movedim(slot.axis.dim, 0)[entries]
            total += rows.reshape(space.size, -1).sum(1).cpu()
    return total.topk(max(1, count)).indices.sort().values
