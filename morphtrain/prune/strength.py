"""How strong a penalty is: what `prune.lasso_ratio` means.

`initial_norm`: how much of the initial norms of all groups the penalty would take off in the whole run by steps of
length 1, which lr / (1 - momentum) is with the default `optimizer=sgd`. A proximal step takes off lambda times its
length, so lambda follows from the number of steps and the schedule. It is the same for networks of any size.

`loss`: the penalty's share of the loss of the first batch (Lym et al. 2019, eq. 3). The penalty is a sum over all
groups: the fewer there are, the harder the same share pulls at each, and the more steps follow, the further.

Lambda is a factor in the loss in both cases: a learning rate or an optimizer that learns faster also shrinks faster.
"""

from __future__ import annotations

from morphtrain.prune.lasso import penalty_weight_for_ratio, penalty_weight_for_share
from morphtrain.prune.step_length import full_steps
from morphtrain.prune.when import Option, last_active
from morphtrain.state import Run


def first_penalty_weight(option: Option, run: Run, penalty: float, norms: float, weights: float) -> float:
    """Lambda for the whole run, from what is known with its first batch.

    Args:
        penalty: the value of the penalty with lambda 1.
        norms, weights: the sums over its groups of their norms, and of how much they count.
    """
    assert option.lasso_ratio is not None
    if option.lasso_ratio_of == "loss":
        return penalty_weight_for_ratio(option.lasso_ratio, run.loss.item(), penalty)
    length = full_steps(run, last_active(option, run.config.epochs))
    return penalty_weight_for_share(option.lasso_ratio, norms, weights, length)


def ratio_for(option: Option, factor: float) -> float:
    """The `lasso_ratio` with which lambda would be `factor` times what it is."""
    assert option.lasso_ratio is not None
    scaled = factor * option.lasso_ratio
    return scaled / (1 - option.lasso_ratio + scaled) if option.lasso_ratio_of == "loss" else scaled
