"""The sweep: take trials, launch them and tell the study how they ended, until the study has all its trials."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.trial import FrozenTrial, Trial, TrialState

from morphtrain import interrupts, schema
from morphtrain.errors import UserError, first_line
from morphtrain.sweep import report
from morphtrain.sweep.attributes import OVERRIDES_ATTR, RUN_DIR_ATTR, Attributes
from morphtrain.sweep.baseline import Baseline
from morphtrain.sweep.floor import parse_floor
from morphtrain.sweep.sampler import SearchedTrials
from morphtrain.sweep.search_space import SearchSpace, as_space
from morphtrain.sweep.single_run import single_run
from morphtrain.sweep.storage import without_password
from morphtrain.sweep.study import Plan, SharedStudy
from morphtrain.sweep.trial import NO_NUMBER
from morphtrain.sweep.workers import Worker
from morphtrain.tracking import begin_sweep, end_sweep, prepare

log = logging.getLogger(__name__)

WAIT_SECONDS = 2.0  # between two checks whether other workers are still running trials
TRIALS_BEFORE_GIVING_UP = 4


class StudySweeper:
    """What `hydra/sweeper=morphtrain` does; see `morphtrain.sweep.plugin`.

    Args:
        plain: Hydra's own Optuna sweeper, which holds the keys that both have: sampler, direction, storage and so on.
        extend: the user's own search space, see `morphtrain.sweep.search_space`.
        pruner: Optuna's; it is asked in the job, after every epoch.
        baseline, min_accuracy, heartbeat_seconds: as in the plug-in.

    Raises:
        UserError: if a number is out of range.
    """

    def __init__(
        self,
        plain: OptunaSweeperImpl,
        *,
        extend: Callable[[DictConfig, Trial], None] | None,
        pruner: Any,
        baseline: list[str] | None,
        min_accuracy: float | str | None,
        heartbeat_seconds: float,
    ) -> None:
        self.plain = plain
        self.extend = extend
        self.pruner = pruner
        self.baseline = baseline
        self.min_accuracy, self.floor = min_accuracy, parse_floor(min_accuracy)
        if self.floor is not None and self.floor.relative and baseline is None:
            raise UserError(f"hydra.sweeper.min_accuracy={min_accuracy}: hydra.sweeper.baseline=null makes no baseline")
        self.heartbeat_seconds = heartbeat_seconds

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.sweep_dir = Path(config.hydra.sweep.dir).resolve()
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search until the study has its total of trials, those of other workers included; then report."""
        with interrupts.at_once():  # there is nothing yet to end in order
            space, first, plan, study = self._prepared(arguments)
        parent = begin_sweep(first.tracking, plan.name, {}, self.sweep_dir)
        status, artifacts = "FAILED", []
        try:
            with Worker(study.storage, self.sweep_dir, self.heartbeat_seconds) as worker:
                self._work(study, worker, space, parent)
            own = next((str(path) for path in schema.own_directories(self.config.hydra.runtime)), None)
            repeating = functools.partial(self._alone, space=space)
            artifacts = report.close(study.study, first.objective, self.sweep_dir, repeating, own)
            interrupts.check()
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if parent is not None and isinstance(first.tracking, schema.tracking.MLflow):
                # MLflow params cannot change later: the study's facts never do, but the best trial's params would.
                metrics = report.summary(study.study, first.objective)
                end_sweep(first.tracking, parent, metrics, plan.facts, artifacts, status, self.sweep_dir)

    def _prepared(self, arguments: list[str]) -> tuple[SearchSpace, schema.Config, Plan, SharedStudy]:
        """What is searched, the config at its low end, what all workers agree on, and the study."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = SearchSpace([*as_space(self.plain.params), *arguments], self.extend, self.config)
        first = self._check(space)
        sampler, total = self._sampler(space)
        plan = Plan(
            name=schema.sweeper.study_name(self.plain),
            storage=str(self.plain.storage),
            directions=self._directions(first.objective),
            facts={
                "objective": first.objective,
                "overrides": space.fixed,
                "baseline": self.baseline,
                "min_accuracy": self.min_accuracy,
            },
            total=total,
            baseline=None if self.baseline is None else Baseline(self.baseline, space).values(),
            baseline_first=self.floor is not None and self.floor.relative,
        )
        study = SharedStudy(plan, sampler, self.pruner)
        log.info("study %s in %s: %d of %d trials", plan.name, without_password(plan.storage), len(study.trials), total)
        prepare(first.tracking)
        return space, first, plan, study

    def _work(self, study: SharedStudy, worker: Worker, space: SearchSpace, parent: str | None) -> None:
        """Take and run trials until all of the study's have ended."""
        child = [] if parent is None else [f"tracking.parent_run_id={parent}"]
        while True:
            interrupts.check()
            if self.floor is not None:
                self.floor.check_baseline(study.trials)
            if trials := study.take(worker, self.plain.n_jobs, functools.partial(self._choose, space=space)):
                self._run(study, worker, trials, space, child)
            elif study.others_running():
                interrupts.wait(WAIT_SECONDS)
            else:
                break

    def _check(self, space: SearchSpace) -> schema.Config:
        """The config at the low end of all ranges; raises `UserError` if it is invalid at the low or high ends."""
        raw: Any = OmegaConf.to_container(self.config.hydra.sweeper)  # as files show it: interpolations stay
        schema.sweeper.check_storage(str(raw["storage"]))
        without_password(str(self.plain.storage))  # raises UserError if it is not the address of a study
        searched = bool(space.distributions) or space.extend is not None
        example = "what to search, such as {optimizer.lr: interval(0.01,0.1)}"
        schema.check(searched, "hydra.sweeper.params", self.plain.params, example)
        configs = [self._parsed(overrides) for overrides in space.corners()]
        schema.check(configs[0].trial is None, "trial", configs[0].trial, NO_NUMBER)
        if self.baseline is not None:
            self._parsed(Baseline(self.baseline, space).overrides())
        if len(configs[0].objective) > 1 and not isinstance(self.pruner, optuna.pruners.NopPruner):
            raise UserError(
                f"hydra/sweeper/pruner: objective={configs[0].objective} has more than one metric, and Optuna can "
                "stop trials early by only one; hydra/sweeper/pruner=none works"
            )
        return configs[0]

    def _parsed(self, overrides: Sequence[str]) -> schema.Config:
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        return schema.parse(composed)

    def _directions(self, objective: Sequence[str]) -> list[Any]:
        directions = self.plain._get_directions()
        if len(directions) != len(objective):
            raise UserError(
                f"hydra.sweeper.direction={directions}: objective={objective} has {len(objective)} metrics; give one "
                "direction, minimize or maximize, for each"
            )
        return directions

    def _sampler(self, space: SearchSpace) -> tuple[Any, int]:
        """The sampler, and the total number of trials."""
        sampler, total = self.plain.sampler, self.plain.n_trials
        if isinstance(sampler, optuna.samplers.CmaEsSampler):
            raise UserError(
                "hydra/sweeper/sampler=cmaes: Optuna keeps this one's state in the study as a pickle, by which whoever "
                "can write to the study could run code here; tpe, gp, nsgaii, nsgaiii, qmc, random or grid works"
            )
        if not (isinstance(sampler, functools.partial) and sampler.func is optuna.samplers.GridSampler):
            return SearchedTrials(sampler), total
        grid = space.grid()
        points = math.prod(map(len, grid.values())) + (self.baseline is not None)
        return sampler(grid), min(total, points)

    def _run(
        self, study: SharedStudy, worker: Worker, trials: list[Trial], space: SearchSpace, child: list[str]
    ) -> None:
        """Launch trials and wait for them; if this is interrupted, those that have not ended are queued again."""
        open_trials = list(trials)
        commands: dict[Trial, list[str]] = {}
        try:
            for trial in trials:
                try:
                    commands[trial] = [*self._overrides(trial, space), *child]
                except UserError as error:
                    study.fail(worker, trial, str(error))
                    open_trials.remove(trial)
            returns = (
                self.launcher.launch(list(commands.values()), initial_job_idx=trials[0].number) if commands else []
            )
            for trial, returned in zip(commands, returns, strict=True):
                self._settle(study, worker, trial, returned)
                open_trials.remove(trial)
        finally:
            study.give_back(worker, open_trials)
        self._check_failures(study)

    def _choose(self, trial: Trial, space: SearchSpace) -> None:
        """Give a trial its values of the searched keys; a baseline may have none."""
        if not Attributes(trial).is_baseline or Baseline(self.baseline or [], space).values():
            with contextlib.suppress(UserError):  # for a value in the study that is not searched; `_run` says so
                space.suggest(trial)

    def _overrides(self, trial: Trial, space: SearchSpace) -> list[str]:
        run_dir = self._run_dir(trial)
        trial.set_user_attr(RUN_DIR_ATTR, str(run_dir))
        overrides = self._repeating(trial, space)
        trial.set_user_attr(OVERRIDES_ATTR, overrides)
        return [*overrides, f"trial={trial.number}", "resume=auto", f"hydra.sweep.subdir='{run_dir}'"]

    def _repeating(self, trial: Trial | FrozenTrial, space: SearchSpace) -> list[str]:
        """What a trial runs with, from this machine's config and the trial's values of the searched keys."""
        baseline = Baseline(self.baseline or [], space)
        if Attributes(trial).is_baseline and not baseline.values():
            return baseline.overrides()
        return space.suggest(trial) if isinstance(trial, Trial) else space.overrides(trial)

    def _alone(self, trial: FrozenTrial, space: SearchSpace) -> list[str]:
        """The overrides of a single run that trains what a trial has trained."""
        hydra = self.config.hydra
        paths = [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]
        loader = self.hydra_context.config_loader
        return single_run(self._repeating(trial, space), loader, hydra.job.config_name, paths)

    def _run_dir(self, trial: Trial) -> Path:
        """Where the trial's job goes on or begins.

        The study may only name a directory of this trial in which there is a checkpoint already: whoever can write to
        it must not decide where files go.
        """
        stored = Path(Attributes(trial).run_dir or "")
        begun = any((stored / name).is_file() for name in ("last.pt", "previous.pt"))
        return stored if stored.name == str(trial.number) and begun else self.sweep_dir / str(trial.number)

    def _settle(self, study: SharedStudy, worker: Worker, trial: Trial, returned: JobReturn) -> None:
        """Tell the study how a trial ended."""
        attributes = Attributes(study.storage.get_trial(trial._trial_id))
        if returned.status == JobStatus.FAILED:
            interrupts.check()  # a job that fails after a signal fails for it
        try:
            values = returned.return_value
            values = [float(value) for value in (values if isinstance(values, list) else [values])]
        except interrupts.JobInterrupted as interrupt:
            raise interrupts.Interrupted(interrupt.number) from interrupt
        except Exception as error:  # noqa: BLE001 (whatever a job raises ends its trial, not the sweep)
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            study.fail(worker, trial, kind + first_line(error))
            return
        accuracy = attributes.metrics.get("val_accuracy")
        if accuracy is None:  # the job could not reach the storage; its log says why
            study.fail(worker, trial, "its job could not report any epoch to the study")
            return
        if self.floor is not None:
            trial.set_constraint("val_accuracy", self.floor.excess(accuracy, study.trials))
        if attributes.stopped:
            study.prune(worker, trial)
        elif all(map(math.isfinite, values)):
            study.complete(worker, trial, values)
        else:
            study.fail(worker, trial, f"its objective is {values}")

    def _check_failures(self, study: SharedStudy) -> None:
        ended = [trial for trial in study.trials if trial.state.is_finished()]
        failed = [trial for trial in ended if trial.state == TrialState.FAIL]
        rate = self.plain.max_failure_rate
        if len(ended) >= TRIALS_BEFORE_GIVING_UP and len(failed) > rate * len(ended):
            raise UserError(
                f"hydra.sweeper.max_failure_rate={rate}: {len(failed)} of {len(ended)} trials failed; trial "
                f"{failed[-1].number} said: {Attributes(failed[-1]).error}"
            )
