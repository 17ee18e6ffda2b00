"""When pruning acts and how far a step's penalty reaches: what methods share that add one to the loss."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.optim import Optimizer

from morphtrain.errors import UserError
from morphtrain.schema.prune import MorphNetPenalty, PruneTrain
from morphtrain.state import Run

Option = PruneTrain | MorphNetPenalty

log = logging.getLogger(__name__)


def is_active(option: Option, epoch: int) -> bool:
    """Whether there is a penalty and a reconfiguration in this epoch at all."""
    return option.stop_epoch is None or epoch <= option.stop_epoch


def is_due(option: Option, epoch: int) -> bool:
    """Whether a reconfiguration falls behind this epoch."""
    since = epoch - option.start_epoch
    return since >= 0 and since % option.interval == 0


def check_reach(option: Option, run: Run) -> None:
    """Warn if the network will never be reconfigured; raises `UserError` if it has nothing that could go."""
    if option.start_epoch > run.config.epochs:
        log.warning(
            "prune.start_epoch=%d is behind the last epoch (epochs=%d): the network will not shrink",
            option.start_epoch,
            run.config.epochs,
        )
    if run.epoch == 0 and all(space.size <= option.min_channels for space in run.graph.spaces):
        raise UserError(
            f"prune.min_channels={option.min_channels}: no layer of the model is wider, nothing can be "
            "pruned; choose a wider model or prune=none"
        )


def step_length(optimizer: Optimizer, weight: torch.Tensor | None = None) -> Any:
    """How far a step goes along a gradient that stays the same: lr / (1 - momentum).

    Momentum repeats a gradient 1 / (1 - momentum) times in all, a threshold has to do the same. AdamW averages
    gradients instead of adding them up. Where layers take steps of different sizes, as with LARS, that of `weight`
    counts.
    """
    group: dict[str, Any] = optimizer.param_groups[0]
    own = getattr(optimizer, "step_size", None)
    lr = group["lr"] if own is None or weight is None else own(weight)
    return lr / (1 - group.get("momentum", 0.0))
