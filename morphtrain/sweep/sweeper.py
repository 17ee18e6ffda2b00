"""The sweep: take trials, launch them and tell the study how they ended, until the study has all its trials."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.trial import FrozenTrial, Trial

from morphtrain import interrupts, schema
from morphtrain.errors import Incompatible, UserError
from morphtrain.evidence import experiment as evidence
from morphtrain.evidence.calibration import CALIBRATED
from morphtrain.evidence.experiment import Arm
from morphtrain.experiment.sweeper import ArmsSweeper
from morphtrain.schema.sweeper import Confirm, MoreBaseline
from morphtrain.sweep import confirmation, report
from morphtrain.sweep.attributes import Attributes
from morphtrain.sweep.baseline import Baselines
from morphtrain.sweep.checks import check_confirm, check_directions, check_pruner, check_sampler
from morphtrain.sweep.comparison import compared
from morphtrain.sweep.display import Display
from morphtrain.sweep.floor import parse_floor
from morphtrain.sweep.jobs import Jobs
from morphtrain.sweep.sampler import SearchedTrials
from morphtrain.sweep.search_space import SearchSpace, as_space, branches_of
from morphtrain.sweep.single_run import single_run
from morphtrain.sweep.storage import dashboard, without_password
from morphtrain.sweep.study import WAIT_SECONDS, Plan, SharedStudy
from morphtrain.sweep.target import Target
from morphtrain.sweep.trial import NO_NUMBER
from morphtrain.sweep.workers import Worker
from morphtrain.tracking import begin_sweep, end_sweep, prepare

log = logging.getLogger(__name__)


class StudySweeper:
    """What `hydra/sweeper=morphtrain` does; see `morphtrain.sweep.plugin`.

    Args:
        plain: Hydra's own Optuna sweeper, which holds the keys that both have: sampler, direction, storage and so on.
        extend: the user's own search space, see `morphtrain.sweep.search_space`.
        pruner: Optuna's; it is asked in the job, after every epoch.
        baseline, min_accuracy, heartbeat_seconds, more_baselines, shares, confirm, repeat: as in the plug-in.

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
        more_baselines: Mapping[str, MoreBaseline] | None = None,
        shares: Mapping[str, Any] | None = None,
        confirm: Confirm | None = None,
        repeat: bool = False,
    ) -> None:
        self.plain = plain
        self.extend = extend
        self.pruner = pruner
        self.baseline = baseline
        self.min_accuracy, self.floor = min_accuracy, parse_floor(min_accuracy)
        if self.floor is not None and self.floor.relative and baseline is None:
            raise UserError(f"hydra.sweeper.min_accuracy={min_accuracy}: hydra.sweeper.baseline=null makes no baseline")
        self.heartbeat_seconds = heartbeat_seconds
        self.more_baselines, self.shares = more_baselines or {}, shares or {}
        self.confirm = confirm or Confirm(best=0, seeds=5)
        self.repeat = repeat
        for key, wanted in (("more_baselines", self.more_baselines), ("confirm.best", self.confirm.best)):
            if wanted and baseline is None:
                raise UserError(f"hydra.sweeper.{key}: needs a baseline, and hydra.sweeper.baseline=null makes none")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.sweep_dir = Path(config.hydra.sweep.dir).resolve()
        self.target = Target.of(config, self.floor)
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search until the study has its total of trials, those of other workers included; then report."""
        with interrupts.at_once():  # there is nothing yet to end in order
            baselines, first, plan, study = self._prepared(arguments)
        parent = begin_sweep(first.tracking, plan.name, {}, self.sweep_dir)
        status, artifacts, confirmed = "FAILED", [], {}
        try:
            with Worker(study.storage, self.sweep_dir, self.heartbeat_seconds) as worker:
                self._work(study, worker, baselines, parent)
            own = next((str(path) for path in schema.own_directories(self.config.hydra.runtime)), None)
            repeating = functools.partial(self._alone, trials=study.trials, baselines=baselines)
            more_to_come = self.confirm.best > 0
            artifacts = report.close(study.study, first.objective, self.sweep_dir, repeating, own, more_to_come)
            print(f"in the browser:  {dashboard(plan.storage)}")
            interrupts.check()
            if more_to_come:
                rerun = functools.partial(report.rerun, repeating=repeating, config_dir=own)
                confirmed = self._confirm(study, plan, baselines, first.tracking, parent, rerun)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if parent is not None and isinstance(first.tracking, schema.tracking.MLflow):
                # MLflow params cannot change later: the study's facts never do, but the best trial's params would.
                metrics = report.summary(study.study, first.objective) | confirmed
                end_sweep(first.tracking, parent, metrics, plan.facts, artifacts, status, self.sweep_dir)

    def _prepared(self, arguments: list[str]) -> tuple[Baselines, schema.Config, Plan, SharedStudy]:
        """The baselines and what is searched, the config at its low end, what all workers agree on, and the study."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        given = [*as_space(self.plain.params), *arguments]
        space = SearchSpace(given, self.extend, self.config, branches_of(self.plain.params), self.shares)
        baselines = Baselines(self.baseline, self.more_baselines, space, self._composed)
        first = self._check(baselines)
        sampler, total = self._sampler(baselines)
        directions: list[Any] = self.plain._get_directions()
        plan = Plan(
            name=schema.sweeper.study_name(self.plain),
            storage=str(self.plain.storage),
            directions=directions,
            facts={
                "objective": first.objective,
                "overrides": space.fixed,
                "baseline": self.baseline,
                "min_accuracy": self.min_accuracy,
                **({"more_baselines": baselines.more} if baselines.more else {}),
            },
            total=total,
            baseline=baselines.values(),
            baseline_first=self.floor is not None and self.floor.relative,
            more_baselines=list(baselines.more),
        )
        study = SharedStudy(plan, sampler, self.pruner)
        log.info("study %s in %s: %d of %d trials", plan.name, without_password(plan.storage), len(study.trials), total)
        log.info("to watch it: %s", dashboard(plan.storage))
        prepare(first.tracking)
        return baselines, first, plan, study

    def _work(self, study: SharedStudy, worker: Worker, baselines: Baselines, parent: str | None) -> None:
        """Take and run trials until all of the study's have ended."""
        launcher = self.config.hydra.runtime.choices["hydra/launcher"]
        display = Display(study.study, self.target.objective, study.plan.total, self.plain.n_jobs, launcher)
        jobs = Jobs(
            study=study,
            worker=worker,
            launcher=self.launcher,
            repeating=functools.partial(self._repeating, baselines=baselines),
            composed=self._composed,
            child=[] if parent is None else [f"tracking.parent_run_id={parent}"],
            sweep_dir=self.sweep_dir,
            target=self.target,
            floor=self.floor,
            max_failure_rate=self.plain.max_failure_rate,
            repeat=self.repeat,
            display=display,
        )
        while True:
            display.look(worker.trial_ids)
            interrupts.check()
            if self.floor is not None:
                self.floor.check_baseline(study.trials)
            if trials := study.take(worker, self.plain.n_jobs, functools.partial(self._choose, baselines=baselines)):
                jobs.run(trials)
            elif study.others_running():
                with display.drawn():
                    interrupts.wait(WAIT_SECONDS)
            else:
                break

    def _check(self, baselines: Baselines) -> schema.Config:
        """The config at the low end of all ranges; raises `UserError` if it is invalid at the low or high ends."""
        raw: Any = OmegaConf.to_container(self.config.hydra.sweeper)  # as files show it: interpolations stay
        schema.sweeper.check_storage(str(raw["storage"]))
        without_password(str(self.plain.storage))  # raises UserError if it is not the address of a study
        space = baselines.space
        searched = bool(space.distributions) or any(b.distributions for b in space.branches) or space.extend is not None
        example = "what to search, such as {optimizer.lr: interval(0.01,0.1)}"
        schema.check(searched, "hydra.sweeper.params", self.plain.params, example)
        configs = [config for corners in space.corners() if (config := self._first_parsed(corners)) is not None]
        first = configs[0] if configs else self._parsed(space.corners()[0][0])  # which says what excludes what
        schema.check(first.trial is None, "trial", first.trial, NO_NUMBER)
        for overrides in (baselines.first(), *baselines.more.values()) if self.baseline is not None else ():
            self._parsed(overrides)
        directions, objective = self.plain._get_directions(), first.objective
        check_pruner(self.pruner, directions, objective)
        check_directions(directions, objective)
        check_confirm(self.confirm.best, directions, objective)
        return first

    def _first_parsed(self, alternatives: Sequence[Sequence[str]]) -> schema.Config | None:
        """The config of the first of these that is valid; raises what is wrong with the first if none is.

        None for options that exclude one another: other trials may have others.
        """
        mistakes = []
        for overrides in alternatives:
            try:
                return self._parsed(overrides)
            except UserError as error:
                mistakes.append(error)
        if isinstance(mistakes[0], Incompatible):
            return None
        raise mistakes[0]

    def _parsed(self, overrides: Sequence[str]) -> schema.Config:
        return schema.parse(self._composed([*overrides, *self.target.to_check]))

    def _composed(self, overrides: Sequence[str]) -> DictConfig:
        """The config of a run, without Hydra's own."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        return composed

    def _sampler(self, baselines: Baselines) -> tuple[Any, int]:
        """The sampler, and the total number of trials."""
        sampler, total = self.plain.sampler, self.plain.n_trials
        check_sampler(sampler, baselines.space.branches)
        if not (isinstance(sampler, functools.partial) and sampler.func is optuna.samplers.GridSampler):
            return SearchedTrials(sampler), total
        grid = baselines.space.grid()
        points = math.prod(map(len, grid.values())) + (self.baseline is not None) + len(baselines.more)
        return sampler(grid), min(total, points)

    def _choose(self, trial: Trial, baselines: Baselines) -> None:
        """Give a trial its values of the searched keys; a baseline may have none."""
        with contextlib.suppress(UserError):  # for a value in the study that is not searched; `Jobs.run` says so
            if baselines.overrides(trial) is None:
                baselines.space.suggest(trial)

    def _repeating(self, trial: Trial | FrozenTrial, baselines: Baselines) -> list[str]:
        """What a trial runs with, from this machine's config and the trial's values of the searched keys."""
        own = baselines.overrides(trial)
        if own is not None:
            return own
        return baselines.space.suggest(trial) if isinstance(trial, Trial) else baselines.space.overrides(trial)

    def _alone(self, trial: FrozenTrial, trials: Sequence[FrozenTrial], baselines: Baselines) -> list[str]:
        """The overrides of a single run that trains what a trial has trained."""
        hydra = self.config.hydra
        paths = [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]
        loader = self.hydra_context.config_loader
        overrides = [*self._repeating(trial, baselines), *self.target.overrides(trials)]
        return single_run(overrides, loader, hydra.job.config_name, paths)

    def _confirm(
        self,
        study: SharedStudy,
        plan: Plan,
        baselines: Baselines,
        tracking: Any,
        parent: str | None,
        rerun: Callable[[FrozenTrial], str],
    ) -> dict[str, float]:
        """Run the best trials and the baselines with fresh seeds and print what that saves; metrics of it.

        Args:
            rerun: gives the command that repeats a trial.
        """
        found = self._confirmation(study, plan, baselines)
        if found is None:
            print("nothing to confirm: no searched trial is feasible and different from the baselines")
            return {}
        arms = ArmsSweeper({"attempts": confirmation.ATTEMPTS})
        arms.place(self.hydra_context, self.config, self.launcher, found.directory, tracking)
        trial = found.run(arms, self.heartbeat_seconds, parent)
        if not (found.directory / evidence.FILE).exists():
            print(f"another worker has run the best trials with fresh seeds, in {Attributes(trial).run_dir}")
            return {}
        winner = found.show()
        if winner.arm is not None:
            again = study.trials[confirmation.number_of(winner.arm)]
            print(f"to run {winner.arm} again:  {rerun(again)}")
        return confirmation.metrics(winner)

    def _confirmation(self, study: SharedStudy, plan: Plan, baselines: Baselines) -> confirmation.Confirmation | None:
        """Declare these runs; None without a trial that is worth it."""
        trials, objective = study.trials, plan.facts["objective"]
        best = report.best_searched(compared(study.study, objective), self.confirm.best)
        own = {}
        for trial in best:
            with contextlib.suppress(UserError):  # something else than this sweep has put it into the study
                own[confirmation.name_of(trial)] = self._repeating(trial, baselines)
        aim, name = self.target.overrides(trials), f"confirm-{len(trials)}"
        first = self._repeating(trials[0], baselines)
        arms = confirmation.arms(first, baselines, own, lambda overrides: self._composed([*overrides, *aim]))
        if not arms:
            return None
        arms = {arm: Arm((*keys.overrides, *aim), keys.role) for arm, keys in arms.items()}
        seeds = confirmation.fresh_seeds(trials, int(self.config.seed), self.confirm.seeds)
        calibrated = self.config.timing.reference > 0
        response = CALIBRATED.get(objective[0], objective[0]) if calibrated else objective[0]
        return confirmation.Confirmation(
            confirmation.declared(plan.name, name, arms, seeds, response),
            Plan(f"{plan.name} {name}", plan.storage, ["minimize"], {"confirm": vars(self.confirm)}, 1, None),
            self.sweep_dir,
            self.sweep_dir / name,
            self.target.accuracy(trials, self.floor),
        )
