"""A study that several workers may share, at once or one after the other: who runs which trial, and how many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from morphtrain.errors import UserError
from morphtrain.sweep.attributes import BASELINE_ATTR, ERROR_ATTR, EXCLUDED_ATTR, NAME_ATTR, Attributes
from morphtrain.sweep.storage import exclusive, open_storage
from morphtrain.sweep.workers import Worker, abandoned
from morphtrain.wording import as_yaml

log = logging.getLogger(__name__)

WAIT_SECONDS = 2.0  # between two checks whether other workers are still running trials


@dataclass(frozen=True)
class Plan:
    """What all workers of a study must agree on."""

    name: str
    storage: str
    directions: Sequence[Literal["minimize", "maximize"]]
    facts: Mapping[str, Any]  # stored with the study: what its values depend on
    total: int  # number of trials, failed ones included
    baseline: Mapping[str, Any] | None  # trial 0's values of the searched keys; None for no such trial
    baseline_first: bool = False  # no other trial starts before it has ended
    more_baselines: Sequence[str] = ()  # names of those beside trial 0, whose trials come next


class SharedStudy:
    """Takes trials of an Optuna study for one worker, and gives them back or ends them.

    Steps that read the study and then change it exclude all other workers meanwhile.
    """

    def __init__(self, plan: Plan, sampler: Any, pruner: Any) -> None:
        """Open or create the study; raises `UserError` if an existing one of that name has other `facts`."""
        self.plan = plan
        self.storage = open_storage(plan.storage)
        with exclusive(plan.storage):
            self.study = optuna.create_study(
                study_name=plan.name,
                storage=self.storage,
                sampler=sampler,
                pruner=pruner,
                directions=list(plan.directions),
                load_if_exists=True,
            )
            if self._joined():
                sampler.reseed_rng()  # with the same seed it would repeat an earlier worker's suggestions
            if not self.study.trials and plan.baseline is not None:
                self.study.enqueue_trial(dict(plan.baseline), user_attrs={BASELINE_ATTR: True})
            known = {Attributes(trial).baseline for trial in self.study.trials}
            for name in plan.more_baselines:
                if name not in known:  # a worker may have been killed between two of them
                    self.study.enqueue_trial({}, user_attrs={NAME_ATTR: name})

    def _joined(self) -> bool:
        """Whether it was opened before, by another worker or an earlier start; checks that it had the same facts."""
        wanted = {"directions": list(self.plan.directions), **self.plan.facts}
        stored = self.study.user_attrs.get("facts")
        if stored is None and not self.study.trials:
            self.study.set_user_attr("facts", wanted)
            return False
        for key, value in wanted.items():
            then = stored.get(key) if isinstance(stored, dict) else None
            if then != value:
                raise UserError(
                    f"hydra.sweeper.study_name={self.plan.name}: its trials have {key}={as_yaml(then)}, "
                    f"which cannot be compared with {as_yaml(value)}; use the same value, or another study_name"
                )
        return True

    def take(self, worker: Worker, most: int, choose: Callable[[Trial], object]) -> list[Trial]:
        """Up to `most` trials for `worker`: abandoned ones first, then new ones until the study has its total.

        None while the baseline runs, if it has to come first. `choose` gives a trial its values. No other worker takes
        trials meanwhile, so that each sampler knows what all others are trying.
        """
        with exclusive(self.plan.storage):
            self._release_abandoned(worker.heartbeat_seconds)
            worker.remove_dead()
            trials = self.study.get_trials(deepcopy=False)
            waiting = sum(trial.state == TrialState.WAITING for trial in trials)
            number = min(most, waiting + max(0, self.plan.total - len(trials)))
            if self.plan.baseline_first and not trials[0].state.is_finished():
                number = 0 if trials[0].state == TrialState.RUNNING else min(number, 1)
            taken = [self.study.ask() for _ in range(number)]
            for trial in taken:
                worker.take(trial._trial_id)
            try:
                for trial in taken:
                    choose(trial)
            except BaseException:
                self.give_back(worker, taken)
                raise
        return taken

    def _release_abandoned(self, heartbeat_seconds: float) -> None:
        """Queue the running trials of dead workers again; another worker goes on from their checkpoints."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if abandoned(trial.user_attrs, heartbeat_seconds):
                log.info("trial %d was abandoned by a dead worker: it is queued again", trial.number)
                self._requeue(trial._trial_id)

    def give_back(self, worker: Worker, trials: Sequence[Trial]) -> None:
        """Queue trials that this worker will not finish again, for another worker."""
        for trial in trials:
            worker.drop(trial._trial_id)
            self._requeue(trial._trial_id)

    def _requeue(self, trial_id: int) -> None:
        self.storage.set_trial_state_values(trial_id, TrialState.WAITING)

    def others_running(self) -> int:
        """The number of trials that other workers are running; this worker must have none."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def complete(self, worker: Worker, trial: Trial, values: Sequence[float]) -> None:
        """End a trial with the values of its objective."""
        self._tell(worker, trial, TrialState.COMPLETE, values)

    def prune(self, worker: Worker, trial: Trial) -> None:
        """End a trial that was stopped early; its last reported value becomes its value."""
        self._tell(worker, trial, TrialState.PRUNED)

    def fail(self, worker: Worker, trial: Trial, reason: str, excluded: bool = False) -> None:
        """End a trial without a value, and log and store the reason; `excluded`: its options exclude one another."""
        log.warning("trial %d failed: %s", trial.number, reason)
        trial.set_user_attr(ERROR_ATTR, reason)
        if excluded:
            trial.set_user_attr(EXCLUDED_ATTR, True)
        self._tell(worker, trial, TrialState.FAIL)

    def _tell(self, worker: Worker, trial: Trial, state: TrialState, values: Sequence[float] | None = None) -> None:
        worker.drop(trial._trial_id)
        try:
            self.study.tell(trial, values, state)
        except RuntimeError as error:
            # After the last trial the grid sampler stops the study, which Optuna allows only in `optimize`. By then the
            # trial's result is stored.
            if "Study.stop" not in str(error):
                raise

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials of the study, whichever worker ran them."""
        return self.study.get_trials(deepcopy=False)
