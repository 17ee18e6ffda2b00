"""Early-Bird tickets (You et al. 2020, arXiv 1909.11957, section 3.2): a choice of channels that has settled.

bird = EarlyBird(most=0.1)
...
if bird.settled(mask):  # after an epoch
    cut(mask)
"""

from __future__ import annotations

import torch

CHECKS = 5  # the paper's length of the queue of masks


class EarlyBird:
    """Compares the choices of several epochs.

    Args:
        most: the share of the channels in which two choices may differ and still be alike; the paper's is 0.1.

    Attributes:
        masks: the last choices, at most five, each (C,) over all channels.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.masks: list[torch.Tensor] = []

    def settled(self, mask: torch.Tensor) -> bool:
        """Whether a choice (C,), bool, is like each of the five before it; from now on it is one of these."""
        distances = [(mask != other).double().mean().item() for other in self.masks]
        self.masks = [*self.masks, mask][-CHECKS:]
        return len(distances) == CHECKS and max(distances) < self.most
