"""How far a step's penalty reaches: what a proximal step has to take off."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from morphtrain.errors import UserError


def step_length(optimizer: Optimizer, weight: torch.Tensor | None = None) -> Any:
    """How far a step goes along a gradient that stays the same: lr / (1 - momentum).

    Momentum repeats a gradient 1 / (1 - momentum) times in all, so a threshold has to do the same. AdamW averages
    gradients instead of adding them up.

    Args:
        weight: whose step counts, where layers take steps of different lengths, as with LARS, or parameter groups do.

    Returns:
        A number, or a scalar tensor where the optimizer computes the length on its device.

    Raises:
        UserError: without a `weight`, if parameter groups take steps of different lengths.
    """
    group = _group_of(optimizer, weight)
    own = getattr(optimizer, "step_size", None)
    lr = group["lr"] if own is None or weight is None else own(weight)
    return lr / (1 - group.get("momentum", 0.0))


def _group_of(optimizer: Optimizer, weight: torch.Tensor | None) -> dict[str, Any]:
    """The group whose learning rate and momentum count: any, if they are the same in all."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    if len({(group["lr"], group.get("momentum", 0.0)) for group in groups}) == 1:
        return groups[0]
    if weight is None:
        raise UserError("prune=morphnet: the optimizer's groups have different learning rates; it needs one for all")
    return next(group for group in groups if any(p is weight for p in group["params"]))
