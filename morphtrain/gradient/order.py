"""The order in which a forward pass uses weights, and where in it a backward pass is that computes layers again."""

from __future__ import annotations

from collections import deque

import torch

from morphtrain.layer_calls import source


class Order:
    """Numbers the calls of a forward pass from 1, and tells of one that is made again which of them it may be.

    Attributes:
        calls: how many there have been.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._numbers: dict[torch.Tensor, list[int]] = {}  # of the calls with a weight, by what that comes from

    def number(self, weight: torch.Tensor) -> int:
        """That of a call that is made for the first time."""
        self.calls += 1
        self._numbers.setdefault(origin(weight), []).append(self.calls)
        return self.calls

    def numbers_again(self, weight: torch.Tensor) -> list[int]:
        """Those of the calls that had this weight, at least one; a weight that has not been seen yet gets a new one.

        That is one which a pass without gradients has computed, so that nothing says from what.
        """
        found = self._numbers.get(origin(weight))
        return found or [self.number(weight)]


def origin(weight: torch.Tensor) -> torch.Tensor:
    """The parameter that a weight is, or the nearest one that it is computed from; without one, the weight itself."""
    weight = source(weight)
    waiting = deque([] if weight.grad_fn is None else [weight.grad_fn])
    seen = set(waiting)
    while waiting:
        node = waiting.popleft()
        if hasattr(node, "variable"):  # torch's node that adds to a parameter's gradient
            parameter: torch.Tensor = node.variable
            return parameter
        following = [function for function, _ in node.next_functions if function is not None]
        waiting.extend(function for function in following if function not in seen)
        seen.update(following)
    return weight
