"""How far a step's penalty reaches: what a proximal step has to take off."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


def step_length(optimizer: Optimizer, weight: torch.Tensor | None = None) -> Any:
    """How far a step goes along a gradient that stays the same: lr / (1 - momentum).

    Momentum repeats a gradient 1 / (1 - momentum) times in all, so a threshold has to do the same. AdamW averages
    gradients instead of adding them up.

    Args:
        weight: whose step counts, where layers take steps of different lengths, as with LARS.

    Returns:
        A number, or a scalar tensor where the optimizer computes the length on its device.
    """
    group: dict[str, Any] = optimizer.param_groups[0]
    own = getattr(optimizer, "step_size", None)
    lr = group["lr"] if own is None or weight is None else own(weight)
    return lr / (1 - group.get("momentum", 0.0))
