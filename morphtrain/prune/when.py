"""When pruning acts: in which epochs there is a penalty, and after which the network is reconfigured."""

from __future__ import annotations

import logging

from morphtrain.errors import UserError
from morphtrain.schema.prune import MorphNetPenalty, PruneTrain
from morphtrain.state import Run

Option = PruneTrain | MorphNetPenalty

log = logging.getLogger(__name__)


def is_active(option: Option, epoch: int) -> bool:
    """Whether there is a penalty in this epoch, and possibly a reconfiguration after it."""
    return option.stop_epoch is None or epoch <= option.stop_epoch


def is_due(option: Option, epoch: int) -> bool:
    """Whether a reconfiguration follows this epoch, if pruning is active in it."""
    since = epoch - option.start_epoch
    return since >= 0 and since % option.interval == 0


def last_active(option: Option, epochs: int) -> int:
    """The last epoch of a run that has a penalty."""
    return epochs if option.stop_epoch is None else min(epochs, option.stop_epoch)


def last_reconfiguration(option: Option, epochs: int) -> int | None:
    """The last epoch of a run that is followed by a reconfiguration; None if there is none."""
    last = last_active(option, epochs)
    return last - (last - option.start_epoch) % option.interval if last >= option.start_epoch else None


def check_reach(option: Option, run: Run) -> None:
    """Warn if the network will never be reconfigured, or only when training is over.

    Raises:
        UserError: if no layer is wider than `min_channels`, so that nothing could go.
    """
    if option.start_epoch > run.config.epochs:
        log.warning(
            "prune.start_epoch=%d is after the last epoch (epochs=%d): the network will not shrink",
            option.start_epoch,
            run.config.epochs,
        )
    elif option.start_epoch == run.config.epochs:
        log.warning("prune.start_epoch=%d is the last epoch: no epoch will train a smaller network", option.start_epoch)
    if run.epoch == 0 and all(space.size <= option.min_channels for space in run.graph.spaces):
        raise UserError(
            f"prune.min_channels={option.min_channels}: no layer of the model is wider, nothing can be "
            "pruned; choose a wider model or prune=none"
        )
