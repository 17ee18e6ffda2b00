"""A pruner for times that only grow: it stops what can no longer win, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from morphtrain import schema
from morphtrain.schema.config import TO_ACCURACY
from morphtrain.sweep.attributes import Attributes
from morphtrain.timing.summaries import NEVER

CLOCKS = ("train_seconds", "calibrated_train_seconds", *TO_ACCURACY)  # metrics whose end can be bounded


def least(metric: str, record: Mapping[str, float]) -> float:
    """The least that one of `CLOCKS` can be at the end of a run, given the record of an epoch.

    A clock never decreases. A time to an accuracy that is not reached yet will be more than what the clock shows; if it
    is reached, it can stay what it is.
    """
    return min(record[metric], record[TO_ACCURACY[metric]]) if metric in TO_ACCURACY else record[metric]


class Overtaken(BasePruner):
    """Stops a trial once it has taken longer than the best trials took as a whole.

    Percentile pruners compare trials at the same epoch, and so lose those that become fast late, as pruning makes them.
    This one loses none of the best: what it stops would not have become one of them, however it went on.

    Args:
        best: how many of the best trials are to be found as if nothing had been stopped.

    Raises:
        UserError: if that is not 1 or more.
    """

    def __init__(self, best: int = 3) -> None:
        right = type(best) is int and best >= 1
        schema.check(right, "hydra.sweeper.pruner.best", best, "a number of trials, 1 or more")
        self.best = best

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the last value of a trial, the least that it can become, is above that of the `best` best.

        Only trials that have ended and are feasible count, baselines too, and each run once; the study minimizes.
        """
        if trial.last_step is None:
            return False
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ended = [other for other in ended if Attributes(other).same_run_as is None]
        values = sorted(t.values[0] for t in ended if all(excess <= 0 for excess in t.constraints.values()))
        reached = [value for value in values if value < NEVER]
        return len(reached) >= self.best and trial.intermediate_values[trial.last_step] > reached[self.best - 1]
