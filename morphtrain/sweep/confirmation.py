"""The end of a search: its best trials and the baselines run again, with seeds that the search never saw.

The best of many trials is also the luckiest. These runs are an experiment (`morphtrain.experiment`), declared before
the first of them: all arms of a seed side by side, those that have ended are not run again. One worker of the study
takes it, as the one trial of a study of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial, Trial, TrialState

from morphtrain import interrupts, schema
from morphtrain.errors import UserError
from morphtrain.evidence import winner, words
from morphtrain.evidence.experiment import Arm, Experiment
from morphtrain.evidence.repeats import Estimate, estimate, geometric, paired_ratio, share
from morphtrain.evidence.winner import Winner
from morphtrain.experiment.declaration import Typed
from morphtrain.experiment.runs import Run, planned
from morphtrain.experiment.sweeper import ArmsSweeper, check_failures
from morphtrain.sweep.attributes import FIRST, RUN_DIR_ATTR
from morphtrain.sweep.baseline import Baselines
from morphtrain.sweep.study import WAIT_SECONDS, Plan, SharedStudy
from morphtrain.sweep.workers import CONFIRM_PREFIX, Worker
from morphtrain.timing.summaries import NEVER

ATTEMPTS = 3  # to run what fails, or is disturbed while times are not calibrated
MARGIN = 0.01  # of accuracy, that would matter; for the report on these runs
METHOD = "method"  # the role of a searched trial; all others are what it is compared with
PLAIN = "plain"  # of the best trial's arm with the baseline's own options
ACCURACY = "test_accuracy"


def declared(
    study: str, size: str, arms: Mapping[str, Arm], seeds: Sequence[int], response: str, margin: float = MARGIN
) -> Experiment:
    """The experiment; the overrides that all arms have are said once."""
    common = [o for o in next(iter(arms.values())).overrides if all(o in arm.overrides for arm in arms.values())]
    own = {
        name: Arm(tuple(o for o in arm.overrides if o not in common), arm.role, arm.of) for name, arm in arms.items()
    }
    return Experiment(
        name=study,
        size=size,
        question=f"Do the best trials of the study {study} save anything, with seeds that it never saw?",
        thesis="",
        analysis="pays" if any(arm.role == "sooner" for arm in arms.values()) else "ratio",
        response=response,
        arms=own,
        seeds=tuple(seeds),
        margin=margin,
        overrides=tuple(common),
    )


def arms(
    first: Sequence[str],
    baselines: Baselines,
    best: Mapping[str, Sequence[str]],
    composed: Callable[[Sequence[str]], DictConfig],
) -> dict[str, Arm]:
    """The arms: the baselines, the best trial with the baseline's options in place of its own, and the best trials.

    Without its own options the best trial is a dense network of its schedule, width and format; what it saves against
    that is what its method saves. An arm that is the same run as one before it is left out.

    Args:
        first: the overrides of trial 0.
        best: those of the best trials, by name, the best first.
        composed: makes the config of a run from its overrides.

    Returns:
        None of them if no trial is left.
    """
    found = {FIRST: Arm(tuple(first), "dense")}
    found |= {name: Arm(tuple(overrides), baselines.roles[name]) for name, overrides in baselines.more.items()}
    found |= {name: Arm(tuple(overrides), METHOD) for name, overrides in best.items()}
    for name, overrides in list(best.items())[: 1 if baselines.given else 0]:
        plain = Arm(tuple(baselines.instead_of(overrides)), "sooner")
        with contextlib.suppress(UserError):  # where its other values need its options
            schema.parse(composed(plain.overrides))
            found[f"{name}_{PLAIN}"] = plain
    configs: list[Any] = []
    different = {}
    for name, arm in found.items():
        config = OmegaConf.to_container(composed(arm.overrides), resolve=True)
        if config not in configs:
            configs.append(config)
            different[name] = arm
    in_order = sorted(different.items(), key=lambda item: item[1].role == METHOD)
    return dict(in_order) if in_order[-1][1].role == METHOD else {}


def name_of(trial: FrozenTrial) -> str:
    """What the arm of a trial is called."""
    return f"trial_{trial.number}"


def number_of(arm: str) -> int:
    """The number of the trial whose arm has this name."""
    return int(arm.removeprefix("trial_"))


def fresh_seeds(trials: Sequence[FrozenTrial], usual: int, count: int) -> list[int]:
    """The lowest seeds that no trial had: `usual`, unless it was searched."""
    seen = {usual, *(trial.params.get("seed") for trial in trials)}
    return list(itertools.islice((seed for seed in itertools.count(1) if seed not in seen), count))


@dataclass(frozen=True)
class Confirmation:
    """The experiment at the end of a search, and who runs it.

    Args:
        plan: of the study whose one trial it is.
        sweep_dir: where the search's files are.
        directory: for the runs.
        accuracy: `val_accuracy` below which a run has missed what it had to reach; None if nothing.
    """

    experiment: Experiment
    plan: Plan
    sweep_dir: Path
    directory: Path
    accuracy: float | None

    def run(self, sweeper: ArmsSweeper, heartbeat_seconds: float, parent: str | None) -> FrozenTrial:
        """Run what is left, or wait for the worker that does; returns the trial that it has been.

        Raises:
            UserError: if runs have failed; the same command repeats them.
        """
        study = SharedStudy(self.plan, optuna.samplers.RandomSampler(), optuna.pruners.NopPruner())
        failed = sum(trial.state == TrialState.FAIL for trial in study.trials)
        study.plan = replace(self.plan, total=failed + 1)  # one that has failed is repeated, by a later command
        with Worker(study.storage, self.sweep_dir, heartbeat_seconds, CONFIRM_PREFIX) as worker:
            while True:
                interrupts.check()
                if trials := study.take(worker, 1, _place(self.directory)):
                    self._run(study, worker, trials[0], sweeper, parent)
                elif study.others_running():
                    interrupts.wait(WAIT_SECONDS)
                else:
                    return study.trials[-1]

    def _run(self, study: SharedStudy, worker: Worker, trial: Trial, sweeper: ArmsSweeper, parent: str | None) -> None:
        try:
            with sweeper.runs_of(self.experiment) as found:
                failures = sweeper.run_all(self.experiment, found, Typed((), (), None), parent)
        except BaseException:
            study.give_back(worker, [trial])
            raise
        try:
            check_failures(failures, len(found))
        except UserError as error:
            study.fail(worker, trial, str(error))
            if any(run.ended for run in found):
                self.show()  # one that diverges is an answer as well
            raise
        study.complete(worker, trial, [float(len(found))])

    def winner(self) -> Winner:
        """What the best of the arms of searched trials saves against the best of the others."""
        times = {arm: {run.seed: time for run, time in self._times(arm)} for arm in self.experiment.arms}
        methods = [name for name, arm in self.experiment.arms.items() if arm.role == METHOD]
        others = [name for name in self.experiment.arms if name not in methods]
        return winner.judge(times, methods, others, len(self.experiment.seeds))

    def show(self) -> Winner:
        """Print all arms, and what the best saves; returns that."""
        from rich.console import Console
        from rich.table import Table

        found = self.winner()
        names = ("arm", "reached", self.experiment.response, "of the best baseline's", ACCURACY, "params", "overrides")
        table = Table(title=f"with {len(self.experiment.seeds)} seeds that the search never saw")
        for name in names:
            table.add_column(name, justify="left" if name in ("arm", "overrides") else "right", overflow="fold")
        for name, arm in self.experiment.arms.items():
            table.add_row(name, *self._row(name, found), " ".join(arm.overrides))
        console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
        console.print(table)
        for line in (f"{words.metric(self.experiment.response)}: {found}", *self._accuracies(found)):
            console.print(line, soft_wrap=True)
        return found

    def _row(self, name: str, found: Winner) -> list[str]:
        """What stands in the table between an arm's name and its overrides."""
        times = {run.seed: time for run, time in self._times(name)}
        ends = {run.seed: run.history()[-1] for run in self._ended(name)}
        best = {} if found.baseline is None else {run.seed: time for run, time in self._times(found.baseline)}
        ratio = None if name == found.baseline else paired_ratio(times, best)
        tested = [end[ACCURACY] for end in ends.values() if ACCURACY in end]
        params = [end["params"] for end in ends.values()]
        return [
            f"{len(times)} of {len(self.experiment.seeds)}",
            _shown(geometric(list(times.values())) if times else None),
            _shown(ratio),
            _shown(share(tested) if tested else None),
            _shown(geometric(params) if params else None),
        ]

    def _accuracies(self, found: Winner) -> list[str]:
        """The winner's accuracy on images that no decision has seen, less the baseline's."""
        if found.arm is None or found.baseline is None:
            return []
        ours, theirs = (
            {run.seed: end[ACCURACY] for run in self._ended(arm) if ACCURACY in (end := run.history()[-1])}
            for arm in (found.arm, found.baseline)
        )
        common = sorted(ours.keys() & theirs.keys())
        if not common:
            return []
        ahead = estimate([ours[seed] - theirs[seed] for seed in common])
        said = words.interval(ahead.mean, ahead.low, ahead.high, signed=True)
        return [f"{ACCURACY} of {found.arm} less that of {found.baseline}: {said}"]

    def _times(self, arm: str) -> list[tuple[Run, float]]:
        """The runs of an arm that have reached what they had to, with what decides."""
        ends = [(run, run.history()[-1]) for run in self._ended(arm)]
        response = self.experiment.response
        reached = [(run, e) for run, e in ends if self.accuracy is None or e["val_accuracy"] >= self.accuracy]
        return [(run, end[response]) for run, end in reached if 0 < end[response] < NEVER]

    def _ended(self, arm: str) -> list[Run]:
        return [run for run in planned(self.experiment, self.directory) if run.arm == arm and run.ended]


def metrics(found: Winner) -> dict[str, float]:
    """What the sweep's own MLflow run gets of it."""
    ratio = found.ratio
    if ratio is None or found.arm is None or ratio.low is None or ratio.high is None:
        return {}
    return {"confirmed_ratio": ratio.mean, "confirmed_ratio_low": ratio.low, "confirmed_ratio_high": ratio.high}


def _place(directory: Path) -> Callable[[Trial], Any]:
    """Says to the other workers where the runs are."""
    return lambda trial: trial.set_user_attr(RUN_DIR_ATTR, str(directory))


def _shown(found: Estimate | None) -> str:
    return "-" if found is None else words.interval(found.mean, found.low, found.high)
