"""How strong a penalty is: what `prune.lasso_ratio` means.

`initial_norm`: how much of the initial norms of all groups the penalty would take off in the whole run by steps of
length 1, which lr / (1 - momentum) is with the default `optimizer=sgd`. A proximal step takes off lambda times its
length, so lambda follows from the number of steps and the schedule. It is the same for networks of any size.

`loss`: the penalty's share of the loss of the first batch (Lym et al. 2019, eq. 3). The penalty is a sum over all
groups: the fewer there are, the harder the same share pulls at each, and the more steps follow, the further.

Lambda is a factor in the loss in both cases: a learning rate or an optimizer that learns faster also shrinks faster.
"""

from __future__ import annotations

import logging

from morphtrain.errors import UserError
from morphtrain.prune.lasso import penalty_weight_for_ratio, penalty_weight_for_share
from morphtrain.prune.step_length import full_steps
from morphtrain.prune.when import Option, last_active
from morphtrain.state import Run

log = logging.getLogger(__name__)

LARGEST_LOSS_SHARE = 0.8  # of the first batch's loss, that a planned penalty may be: beyond it nothing else is learnt


def first_penalty_weight(option: Option, run: Run, penalty: float, norms: float, weights: float) -> float:
    """Lambda for the whole run, from what is known with its first batch.

    Args:
        penalty: the value of the penalty with lambda 1.
        norms, weights: the sums over its groups of their norms, and of how much they count.
    """
    assert option.lasso_ratio is not None
    if option.lasso_ratio_of == "loss":
        return penalty_weight_for_ratio(option.lasso_ratio, run.loss.item(), penalty)
    last = last_active(option, run.config.epochs)
    length = full_steps(run, last)
    if length <= 0:
        raise UserError(f"schedule={run.config.schedule.name}: the learning rate is 0 until epoch {last}")
    planned = penalty_weight_for_share(option.lasso_ratio, norms, weights, length)
    most = penalty_weight_for_ratio(LARGEST_LOSS_SHARE, run.loss.item(), penalty)
    if planned <= most:
        return planned
    log.warning(
        "prune.lasso_ratio=%g: limited to %.2g: in so short a run, more would exceed %.0f %% of the loss",
        *(option.lasso_ratio, option.lasso_ratio * most / planned, 100 * LARGEST_LOSS_SHARE),
    )
    return most


def share_of_loss(penalty: float, loss: float) -> float:
    """The share of the penalty in itself and the loss: 0 where there is none, even if the loss is zero as well."""
    return penalty / (loss + penalty) if penalty else 0.0


def enough_for(option: Option, share: float) -> str:
    """The setting with which the penalty would take all, if it takes this share now."""
    if not share or option.lasso_ratio is None:
        return "a stronger penalty"
    scaled = option.lasso_ratio / share
    ratio = scaled / (1 - option.lasso_ratio + scaled) if option.lasso_ratio_of == "loss" else scaled
    return f"prune.lasso_ratio={ratio:.2g}"
