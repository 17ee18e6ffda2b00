"""The two layers that structural changes need and torch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class PadChannels(nn.Module):
    """Append zero channels before and after the input's channels (the option-A shortcut of He et al. 2015).

    (B, C, H, W) -> (B, left + C + right, H, W). The two widths are attributes and not constants in a `forward`,
    so that a channel graph can change them.
    """

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, 0, self.left, self.right))

    def extra_repr(self) -> str:
        return f"left={self.left}, right={self.right}"


class ZeroBranch(nn.Module):
    """What a residual branch still adds when no channel is left inside it: its last norm, applied to zeros.

    (B, C', H, W) -> (1, C, 1, 1), to be broadcast by the sum. Training mode yields the norm's bias and decays its
    running statistics; evaluation mode uses them: exactly what the norm behind an all-zero convolution does.
    """

    norm: Any

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two positions: batch norm refuses to train on a single value per channel.
        zeros = x.new_zeros(1, self.norm.num_features, 2, 1)
        out: torch.Tensor = self.norm(zeros)
        return out[:, :, :1]
