"""The trials of a worker as jobs: what each is run with, and where; their launch, and what the study is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, Trial, TrialState

from morphtrain import interrupts
from morphtrain.errors import Incompatible, UserError, first_line
from morphtrain.sweep.attributes import (
    METRICS_ATTR,
    OVERRIDES_ATTR,
    RUN_DIR_ATTR,
    SAME_RUN_ATTR,
    SIGNATURE_ATTR,
    Attributes,
)
from morphtrain.sweep.display import Display
from morphtrain.sweep.floor import Floor
from morphtrain.sweep.signature import same_run, signature
from morphtrain.sweep.study import SharedStudy
from morphtrain.sweep.target import Target
from morphtrain.sweep.workers import Worker

TRIALS_BEFORE_GIVING_UP = 4


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """Runs the trials that a worker has taken of a study.

    Args:
        repeating: gives what a trial runs with, from this machine's config and its values of the searched keys.
        composed: makes the config of a run from its overrides.
        child: overrides that say to which run of the sweep a job belongs.
        sweep_dir: below which the runs lie.
        floor: of accuracy; None: whatever is reached counts.
        max_failure_rate: the share of trials that may fail.
        repeat: whether a trial is trained that another one has trained already.
        display: what shows how far the search is.
    """

    study: SharedStudy
    worker: Worker
    launcher: Launcher
    repeating: Callable[[Trial], list[str]]
    composed: Callable[[Sequence[str]], DictConfig]
    child: Sequence[str]
    sweep_dir: Path
    target: Target
    floor: Floor | None
    max_failure_rate: float
    repeat: bool
    display: Display

    def run(self, trials: Sequence[Trial]) -> None:
        """Launch trials and wait for them; if this is interrupted, those that have not ended are queued again.

        A trial that would train the same as another takes that one's values. If the other one begins only now, and has
        none in the end, the trial is queued again.

        Raises:
            UserError: if too many of the study's trials have failed.
        """
        open_trials = list(trials)
        commands: dict[Trial, list[str]] = {}
        same: list[Trial] = []  # as one of these
        try:
            for trial in trials:
                try:
                    overrides = self._overrides(trial)
                except UserError as error:
                    self._fail(trial, str(error), excluded=isinstance(error, Incompatible))
                    open_trials.remove(trial)
                    continue
                if self._may_take(trial) and _signature(trial) in map(_signature, commands):
                    same.append(trial)
                elif self._may_take(trial) and self._take_values(trial):
                    open_trials.remove(trial)
                else:
                    commands[trial] = self._command(trial, overrides)
            returns: Sequence[JobReturn] = []
            if commands:
                with self.display.drawn():
                    returns = self.launcher.launch(list(commands.values()), initial_job_idx=trials[0].number)
            for trial, returned in zip(commands, returns, strict=True):
                self._settle(trial, returned)
                open_trials.remove(trial)
            for trial in same:
                if self._take_values(trial):
                    open_trials.remove(trial)
        finally:
            self.study.give_back(self.worker, open_trials)
        self._check_failures(self.study.trials)

    def _overrides(self, trial: Trial) -> list[str]:
        """What a trial trains, as overrides; stored with it, and its signature."""
        searched = self.repeating(trial)
        overrides = [*searched, *self.target.overrides(self.study.trials)]
        trial.set_user_attr(OVERRIDES_ATTR, overrides)
        # All trials have the same target; keys may go by the trial's number, which by itself changes nothing.
        trial.set_user_attr(SIGNATURE_ATTR, signature(self.composed([*searched, f"trial={trial.number}"])))
        return overrides

    def _may_take(self, trial: Trial) -> bool:
        """Whether a trial may take another's values: not a baseline, nor what has begun to train."""
        return not self.repeat and Attributes(trial).baseline is None and self._begun(trial) is None

    def _take_values(self, trial: Trial) -> bool:
        """End a trial with the values of one that has trained the same; False if there is none."""
        other = same_run(self.study.trials, _signature(trial))
        if other is None:
            return False
        metrics = Attributes(other).metrics
        trial.set_user_attr(METRICS_ATTR, metrics)
        trial.set_user_attr(SAME_RUN_ATTR, other.number)
        self._end(trial, other.values, metrics["val_accuracy"], stopped=False)
        return True

    def _command(self, trial: Trial, overrides: Sequence[str]) -> list[str]:
        """What its job is started with."""
        if Attributes(trial).same_run_as is not None:  # this worker's predecessor was killed before it had ended it
            trial.set_user_attr(SAME_RUN_ATTR, None)
        run_dir = self._begun(trial) or self.sweep_dir / str(trial.number)
        trial.set_user_attr(RUN_DIR_ATTR, str(run_dir))
        more = [f"trial={trial.number}", "resume=auto", f"hydra.sweep.subdir='{run_dir}'"]
        return [*overrides, *more, *self.child]

    def _begun(self, trial: Trial) -> Path | None:
        """Where the trial's job goes on, if it has begun.

        The study may only name a directory of this trial in which there is a checkpoint already: whoever can write to
        it must not decide where files go.
        """
        stored = Path(Attributes(trial).run_dir or "")
        begun = any((stored / name).is_file() for name in ("last.pt", "previous.pt"))
        return stored if stored.name == str(trial.number) and begun else None

    def _settle(self, trial: Trial, returned: JobReturn) -> None:
        """Tell the study how a trial ended."""
        stored = self.study.storage.get_trial(trial._trial_id)
        attributes = Attributes(stored)
        if returned.status == JobStatus.FAILED:
            interrupts.check()  # a job that fails after a signal fails for it
        try:
            values = returned.return_value
            values = [float(value) for value in (values if isinstance(values, list) else [values])]
        except interrupts.JobInterrupted as interrupt:
            raise interrupts.Interrupted(interrupt.number) from interrupt
        except Exception as error:  # noqa: BLE001 (whatever a job raises ends its trial, not the sweep)
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._fail(trial, kind + first_line(error), excluded=isinstance(error, Incompatible))
            return
        accuracy = attributes.metrics.get("val_accuracy")
        if accuracy is None:  # the job could not reach the storage; its log says why
            self._fail(trial, "its job could not report any epoch to the study")
            return
        if self.target.sets(stored):
            metrics = attributes.metrics | self.target.times(stored)
            trial.set_user_attr(METRICS_ATTR, metrics)
            if missing := set(self.target.objective) - metrics.keys():
                self._fail(trial, f"its job could not report all epochs to the study, which {min(missing)} needs")
                return
            values = [metrics[name] for name in self.target.objective]
        self._end(trial, values, accuracy, attributes.stopped)

    def _end(self, trial: Trial, values: Sequence[float], accuracy: float, stopped: bool) -> None:
        """End a trial that has reported these values of the objective; `stopped`: by the pruner."""
        if self.floor is not None:
            trial.set_constraint("val_accuracy", self.floor.excess(accuracy, self.study.trials))
        if self.target.given is not None:
            trial.set_constraint("target_accuracy", self.target.given - accuracy)
        if stopped:
            self.study.prune(self.worker, trial)
        elif all(map(math.isfinite, values)):
            self.study.complete(self.worker, trial, values)
        else:
            self._fail(trial, f"its objective is {values}")

    def _fail(self, trial: Trial, why: str, excluded: bool = False) -> None:
        self.study.fail(self.worker, trial, why, excluded)

    def _check_failures(self, trials: Sequence[FrozenTrial]) -> None:
        """Give up if too many trials have failed, of those whose options do not exclude one another."""
        own = [trial for trial in trials if Attributes(trial).same_run_as is None and not Attributes(trial).excluded]
        ended = [trial for trial in own if trial.state.is_finished()]
        failed = [trial for trial in ended if trial.state == TrialState.FAIL]
        if len(ended) >= TRIALS_BEFORE_GIVING_UP and len(failed) > self.max_failure_rate * len(ended):
            raise UserError(
                f"hydra.sweeper.max_failure_rate={self.max_failure_rate}: {len(failed)} of {len(ended)} trials failed; "
                f"trial {failed[-1].number} said: {Attributes(failed[-1]).error}"
            )


def _signature(trial: Trial) -> str:
    """Of what a trial trains, which is stored with it."""
    return Attributes(trial).signature or ""
