"""A study as its report compares it: by calibrated times where other processes have disturbed some of the trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from morphtrain.evidence.calibration import CALIBRATED, RAW_TIMES, is_calibrated
from morphtrain.schema.config import TO_ACCURACY
from morphtrain.sweep.attributes import Attributes
from morphtrain.timing.summaries import NEVER


@dataclass(frozen=True)
class Comparison:
    """Trials whose values can be compared, if they can.

    Args:
        study: a copy in memory, with the same numbers, whose completed trials have values of `objective`.
        objective: the study's metrics, or their calibrated counterparts.
        contended: number of completed trials that others have disturbed in at least one epoch.
        fair: False if these trials' values are times that cannot be compared with those of others.
    """

    study: optuna.Study
    objective: list[str]
    contended: int
    fair: bool

    @property
    def unchanged(self) -> tuple[int, int]:
        """How many completed trials never changed their network, of how many that were meant to."""
        changed = (Attributes(trial).changed for trial in completed(self.study))
        meant = [epochs for epochs in changed if epochs is not None]
        return sum(not epochs for epochs in meant), len(meant)

    def reached(self, study: optuna.Study) -> optuna.Study:
        """One of these studies without the trials that never reached their target accuracy, unless that leaves none.

        What they have in place of a time would hide all differences between times.
        """
        timed = [name in TO_ACCURACY for name in self.objective]

        def missed(trial: FrozenTrial) -> bool:
            return any(is_time and value >= NEVER for is_time, value in zip(timed, trial.values or [], strict=False))

        left = _copy(study, [_without_result() if missed(trial) else trial for trial in study.get_trials()])
        return left if any(timed) and completed(left) else study

    @property
    def searched(self) -> optuna.Study:
        """The study without the results of the baselines, which have no values of the searched keys."""
        trials = self.study.get_trials()
        return _copy(self.study, [t if Attributes(t).baseline is None else _without_result() for t in trials])


def compared(study: optuna.Study, objective: Sequence[str]) -> Comparison:
    """How the trials of a study whose trials have all ended are to be compared."""
    ended = completed(study)
    contended = sum(bool(Attributes(trial).contended) for trial in ended)
    names = [CALIBRATED.get(name, name) for name in objective] if contended else list(objective)
    if not all(name in Attributes(trial).metrics for trial in ended for name in names):
        names = list(objective)
    shown = (TrialState.COMPLETE, TrialState.PRUNED)  # one that failed may have values that are not searched
    trials = [trial if trial.state in shown else _without_result() for trial in study.get_trials()]
    for trial in trials:
        if trial.state == TrialState.COMPLETE and names != list(objective):
            trial.values = [Attributes(trial).metrics[name] for name in names]
    fair = not contended or not any(map(_is_raw, names, [ended] * len(names)))
    return Comparison(_copy(study, trials), names, contended, fair)


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps to the constraints of its search, such as `min_accuracy`."""
    return all(excess <= 0 for excess in trial.constraints.values())


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """The trials with a result."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _is_raw(name: str, trials: Sequence[FrozenTrial]) -> bool:
    """Whether a metric is a time that nothing has calibrated: neither the clock's, nor by one measurement alone."""
    if name == "median_epoch_seconds" and any("calibrated_seconds" not in Attributes(t).metrics for t in trials):
        return True
    is_time = name in {*CALIBRATED.values(), "median_epoch_seconds"}
    return name in RAW_TIMES or (is_time and not all(map(_is_calibrated, trials)))


def _is_calibrated(trial: FrozenTrial) -> bool:
    """Whether the trial's calibrated times allow for what disturbed it, if anything did."""
    attributes = Attributes(trial)
    return not attributes.contended or is_calibrated([{"reference_seconds": s} for s in attributes.references])


def _copy(study: optuna.Study, trials: Sequence[FrozenTrial]) -> optuna.Study:
    copy = optuna.create_study(study_name=study.study_name, directions=study.directions)
    copy.add_trials(trials)  # numbered in their order, so none may be left out
    return copy


def _without_result() -> FrozenTrial:
    """What stands in a copy for a trial that is not to be shown."""
    return optuna.trial.create_trial(state=TrialState.FAIL)
