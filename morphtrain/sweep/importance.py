"""How much each searched key matters: to the objective over all trials, and to being among the best."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from morphtrain.errors import first_line
from morphtrain.sweep.comparison import completed, is_feasible
from morphtrain.wording import counted

FEWEST = 4  # trials from which variances say anything
BEST = 5  # trials that are the best: Optuna advises so many, with fewer the densities are mostly prior


@dataclass(frozen=True)
class Importance:
    """The shares of the searched keys, which add up to 1.

    Args:
        what: they are important for.
        method: that says so, and of how many trials.
        shares: the largest first; empty if there is no telling.
        why_not: the reason in that case.
    """

    what: str
    method: str
    shares: Mapping[str, float]
    why_not: str = ""

    def __str__(self) -> str:
        if not self.shares:
            return f"no importance for {self.what} ({self.method}): {self.why_not}"
        shares = ", ".join(f"{key} {share:.2f}" for key, share in self.shares.items())
        return f"importance for {self.what} ({self.method}): {shares}"


def importances(searched: optuna.Study, objective: Sequence[str]) -> list[Importance]:
    """What matters in a study, by both methods; nothing where fewer than two keys were varied.

    Args:
        searched: the study without baselines, trials that repeat others, and those that missed their target.
    """
    if len({key for trial in completed(searched) for key in trial.params}) < 2:
        return []
    return [fanova(searched, objective), ped_anova(searched, objective)]


def fanova(searched: optuna.Study, objective: Sequence[str]) -> Importance:
    """Each key's share of the variance of the first metric over the whole space (Hutter et al. 2014).

    Of keys that all trials have; the good and the bad trials count alike, infeasible ones too.
    """
    number = len(completed(searched))
    method = f"fANOVA of {counted(number, 'trial')}"
    if number < FEWEST:
        return Importance(objective[0], method, {}, f"it takes {FEWEST} or more")
    evaluator = FanovaImportanceEvaluator(seed=0)  # the same numbers every time
    target = None if len(searched.directions) == 1 else _first_value
    try:
        shares = get_param_importances(searched, evaluator=evaluator, target=target)
    except (ValueError, RuntimeError) as error:  # all values are equal
        return Importance(objective[0], method, {}, first_line(error))
    return Importance(objective[0], method, shares, "no key was varied in all trials")


def ped_anova(searched: optuna.Study, objective: Sequence[str]) -> Importance:
    """How much each key's values in the best trials differ from those in all (Watanabe et al. 2023, arXiv:2304.10255).

    Also of keys that only some trials have (arXiv:2601.20800). The best are feasible; with several metrics they are
    those of the first Pareto fronts.
    """
    trials = completed(searched)
    what = f"being among the best {BEST}" + (" by Pareto front" if len(objective) > 1 else "")
    method = f"PED-ANOVA of {counted(len(trials), 'trial')}"
    feasible = sum(map(is_feasible, trials))
    if len(trials) < 2 * BEST or feasible < BEST:
        enough = f"it takes {2 * BEST} trials or more, {BEST} of them feasible"
        return Importance(what, method, {}, f"{enough}; {feasible} of these are")
    evaluator = PedAnovaImportanceEvaluator(target_quantile=(BEST - 0.5) / len(trials))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that few trials have, and that shares of 0 are experimental
        found = get_param_importances(_infeasible_last(searched), evaluator=evaluator, normalize=False)
    total = sum(found.values())
    shares = {key: value / total for key, value in found.items()} if total > 0 else {}
    return Importance(what, method, shares, "the best have the values that all have")


def _infeasible_last(study: optuna.Study) -> optuna.Study:
    """A copy in which infeasible trials are worse than all others: PED-ANOVA does not know of constraints."""
    trials = completed(study)
    columns = list(zip(*(trial.values for trial in trials), strict=True))
    worst = [_beyond(values, direction) for values, direction in zip(columns, study.directions, strict=True)]
    infeasible = {trial.number for trial in trials if not is_feasible(trial)}
    copy = optuna.create_study(directions=study.directions)
    for trial in study.get_trials():
        if trial.number in infeasible:
            trial.values = worst
        copy.add_trial(trial)
    return copy


def _first_value(trial: FrozenTrial) -> float:
    return float(trial.values[0])


def _beyond(values: Sequence[float], direction: StudyDirection) -> float:
    """A value that is worse than all of these."""
    spread = max(values) - min(values) or 1.0
    return max(values) + spread if direction == StudyDirection.MINIMIZE else min(values) - spread
