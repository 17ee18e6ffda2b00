"""Labels: which channel an entry of an activation belongs to.

An activation's labels are an int64 tensor of the activation's rank, of size 1 along every dimension that they do not
depend on: (1, C, 1, 1) after a convolution. Label 0 marks what cannot change: the network's inputs and outputs, and
sizes written into the model's code. An operation that moves entries moves the labels in the same way; an operation
that combines entries joins their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def fixed(rank: int) -> torch.Tensor:
    """The labels of an activation of `rank` dimensions in which nothing can change."""
    return torch.zeros([1] * rank, dtype=torch.long)


def along(labels: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """(N,) -> the labels of an activation of `rank` dimensions whose channels are in dimension `dim`."""
    return labels.view([-1 if d == dim % rank else 1 for d in range(rank)])


def full(labels: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """One label per entry of an activation of this shape; repeated labels take no memory."""
    return labels.expand(list(shape))


def compact(labels: torch.Tensor) -> torch.Tensor:
    """The inverse of `full`: size 1 along every dimension that the labels do not depend on."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def varies(labels: torch.Tensor, dim: int) -> bool:
    """Whether the labels depend on the position along `dim`."""
    return labels.shape[dim] > 1


class Joins:
    """Pairs of labels that are the same channel: what happens to one happens to the other."""

    def __init__(self) -> None:
        self.count = 1  # label 0 is taken
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.caller: Any = None  # on whose account labels are joined now
        self.callers: list[Any] = []  # of each pair

    def fresh(self, size: int) -> torch.Tensor:
        """(size,): labels that are not in use yet."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Join the labels entry by entry; the two tensors are broadcast against each other."""
        if a is not b:
            a, b = torch.broadcast_tensors(a, b)
            self.pairs.append((a.flatten(), b.flatten()))
            self.callers.append(self.caller)

    def pin(self, labels: torch.Tensor) -> None:
        """Note that these channels cannot change."""
        self.join(labels, fixed(labels.dim()))

    def tie(self, labels: torch.Tensor, dim: int) -> None:
        """Join all positions along `dim` with each other."""
        if labels.shape[dim] > 1:
            self.join(labels, labels.narrow(dim, 0, 1))

    def first_pins(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Who fixed channels first.

        Returns:
            (count,): the class of each label by all joins but those with what is fixed; and for each class the
            position in `callers`, which is beyond the last where nobody fixed it.
        """
        free = Joins()
        free.count = self.count
        last = torch.full((self.count,), len(self.pairs))
        if not self.pairs:
            return free.roots(), last
        a = torch.cat([pair[0] for pair in self.pairs])
        b = torch.cat([pair[1] for pair in self.pairs])
        number = torch.arange(len(self.pairs)).repeat_interleave(torch.tensor([len(pair[0]) for pair in self.pairs]))
        moving = (a != 0) & (b != 0)
        free.pairs = [(a[moving], b[moving])]
        roots = free.roots()
        one = (a == 0) != (b == 0)
        return roots, last.scatter_reduce_(0, roots[torch.maximum(a, b)[one]], number[one], "amin")

    def roots(self) -> torch.Tensor:
        """(count,): the smallest label of each label's class; minima spread along the joins until nothing changes."""
        roots = torch.arange(self.count)
        if not self.pairs:
            return roots
        a = torch.cat([pair[0] for pair in self.pairs])
        b = torch.cat([pair[1] for pair in self.pairs])
        while True:
            low = torch.minimum(roots[a], roots[b])
            new = roots.clone()
            for side in (a, b, roots[a], roots[b]):
                new.scatter_reduce_(0, side, low, "amin")
            new = new[new]
            if torch.equal(new, roots):
                return roots
            roots = new
