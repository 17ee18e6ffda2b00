"""The loop of an experiment: what is left runs, seed by seed, until every arm has its run or has failed too often."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from morphtrain import interrupts, schema
from morphtrain.errors import UserError, said
from morphtrain.evidence import experiment as evidence
from morphtrain.evidence.calibration import why_not_calibrated
from morphtrain.evidence.experiment import Experiment
from morphtrain.experiment import runs as run_states
from morphtrain.experiment.answer import show_answer
from morphtrain.experiment.declaration import Typed, declared, merged, typed
from morphtrain.experiment.display import Clock, show_plan
from morphtrain.experiment.formats import Choices
from morphtrain.experiment.runs import Run, contended, planned, ready
from morphtrain.files import named_lock, write_atomically
from morphtrain.tracking import begin_sweep, end_sweep, mark_disturbed, prepare
from morphtrain.wording import command_name

LOCK = ".experiment.lock"
PROSE = ("thesis", "claim", "limits")  # what may be worded differently by another version of the file


class ArmsSweeper:
    """What `+experiment=...` does; see `morphtrain.experiment.plugin`.

    Args:
        keys: those of `conf/hydra/sweeper/experiment.yaml`.
    """

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.keys = keys
        self.tracking: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.name = str(config.hydra.runtime.choices["experiment"])
        directory = Path(config.hydra.sweep.dir, f"{self.name}-{self.keys['size']}")
        with read_write(config.hydra):
            config.hydra.sweep.dir = str(directory)  # where launchers begin
        launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )
        self.place(hydra_context, config, launcher, directory, tracking=None)  # known with the declaration

    def place(
        self, hydra_context: HydraContext, config: DictConfig, launcher: Launcher, directory: Path, tracking: Any
    ) -> None:
        """Say where the runs go, what runs them, and what tracks them.

        Args:
            config: what the runs' overrides are added to.
            tracking: the config group of that name.
        """
        self.hydra_context, self.config = hydra_context, config
        self.launcher, self.directory, self.tracking = launcher, directory, tracking
        self.one_at_a_time = config.hydra.runtime.choices["hydra/launcher"] == "basic"

    def sweep(self, arguments: list[str]) -> None:
        """Run what is left.

        Raises:
            UserError: before anything runs, for a declaration that cannot be run or differs from the one that the
                experiment was begun with; at the end, if runs have failed.
        """
        with interrupts.at_once():  # there is nothing yet to end in order
            given = typed(arguments)
            experiment = declared(self.name, self.keys, given, self._composed)
            self.tracking = schema.parse(self._composed([*experiment.overrides, *given.aside])).tracking
        with self.runs_of(experiment) as found:
            if not all(run.ended for run in found):
                self._run_under_parent(experiment, found, given)
            show_answer(self.directory)
        print(f"next: {command_name('report')} {self.directory}")

    @contextlib.contextmanager
    def runs_of(self, experiment: Experiment) -> Iterator[list[Run]]:
        """The runs of an experiment, which meanwhile belong to this process alone; prints how many are left.

        Raises:
            UserError: if another process runs it, or it was begun with another declaration.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._settle_declaration(experiment)
            found = planned(experiment, Path(os.path.abspath(self.directory)))
            self._spoil_unjudged(found)
            show_plan(experiment, found, self.directory)
            yield found

    def _run_under_parent(self, experiment: Experiment, found: Sequence[Run], given: Typed) -> None:
        """Run what has not ended, in MLflow below one run; raises `UserError` if runs have failed."""
        tracking = self.tracking
        prepare(tracking)
        parent = begin_sweep(tracking, self.directory.name, {"study": str(self.directory)}, self.directory)
        status = "FAILED"
        try:
            check_failures(self.run_all(experiment, found, given, parent), len(found))
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            print("interrupted; go on with the same command", flush=True)
            raise
        finally:
            if parent is not None and isinstance(tracking, schema.tracking.MLflow):
                ended = {"runs": float(len(found)), "runs_ended": float(sum(run.ended for run in found))}
                end_sweep(tracking, parent, ended, {"question": experiment.question}, [], status, self.directory)

    def _composed(self, overrides: Sequence[str]) -> DictConfig:
        """The config of a run, without Hydra's own."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        return composed

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = self.directory / LOCK
        try:
            with named_lock(lock, f"process {os.getpid()} on {platform.node()}"):
                yield
        except BlockingIOError:
            raise UserError(
                f"{self.directory}: {lock.read_text()} is running this experiment; wait for its end"
            ) from None

    def _settle_declaration(self, experiment: Experiment) -> None:
        """Write the declaration, or compare it with the one that is there."""
        path = self.directory / evidence.FILE
        plain = evidence.as_plain(experiment)
        if not path.exists():
            write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(plain)).encode())
            return
        before = evidence.as_plain(evidence.load(self.directory))
        for key, value in sorted(plain.items(), key=lambda item: item[0] != "overrides"):  # what else follows from them
            if key not in PROSE and before[key] != value:
                raise UserError(
                    f"{path}: the experiment was begun with {_difference(key, before[key], value)}; "
                    "go on with what it was begun with, or begin another one with hydra.sweep.dir=..."
                )

    def run_all(self, experiment: Experiment, found: Sequence[Run], given: Typed, parent: str | None) -> dict[Run, str]:
        """Run what has not ended; the runs that cannot, with the reason."""
        failures: dict[Run, str] = {}
        clock = Clock(sum(not run.ended for run in found), len(found))
        choices = Choices(experiment, found)
        for seed in experiment.seeds:
            left = [run for run in found if run.seed == seed and not run.ended]
            tries: Counter[Run] = Counter()
            while starting := choices.in_turn(ready(left)):
                interrupts.check()
                starting = starting[:1] if self.one_at_a_time else starting
                own = {run: choices.override(run) for run in starting}
                for run, why in self._launched(experiment, own, given, parent).items():
                    tries[run] += 1
                    again = isinstance(why, str) and tries[run] < int(self.keys["attempts"])
                    clock.show(run, experiment.response, why, again)
                    if not again:
                        left.remove(run)
                        if why is not None:
                            failures[run] = str(why)
            for run in left:
                failures[run] = f"{run.after} has failed, whose structure it trains"
            if failures and not any(run.ended for run in found):
                break  # not one arm can run
        return failures

    def _launched(
        self, experiment: Experiment, starting: Mapping[Run, Sequence[str]], given: Typed, parent: str | None
    ) -> dict[Run, str | UserError | None]:
        """Run some, with overrides of their own.

        For each None if it has ended, else what went wrong: a user's mistake as itself, else a text.
        """
        for run in starting:
            if run.spoilt:
                shutil.rmtree(run.directory)
        jobs = [self._job(experiment, run, own, given, parent) for run, own in starting.items()]
        hydra = self.config.hydra
        try:
            with _silence():
                returned = self.launcher.launch(jobs, initial_job_idx=next(iter(starting)).number)
        finally:  # or what is logged later goes to what was printed to meanwhile
            configure_log(hydra.hydra_logging, hydra.verbose, self.hydra_context.execution_whitelist)
        return {run: self._outcome(run, result) for run, result in zip(starting, returned, strict=True)}

    def _outcome(self, run: Run, returned: JobReturn) -> str | UserError | None:
        """None if the run has ended undisturbed; else what went wrong, and what it recorded counts for nothing."""
        try:
            _ = returned.return_value
        except interrupts.JobInterrupted as interrupt:
            raise interrupts.Interrupted(interrupt.number) from interrupt
        except Exception as error:  # noqa: BLE001 (whatever a job raises ends its run, not the experiment)
            interrupts.check()  # a job that fails after a signal fails for it
            run.spoil()
            return error if isinstance(error, UserError) else said(error)
        return self._disturbed(run)

    def _disturbed(self, run: Run) -> str | None:
        """How a run that has ended was disturbed, in which case it counts for nothing; None if it was not."""
        history = run.history()
        if not contended(history):
            return None
        run.spoil()
        mark_disturbed(self.tracking, run.directory)
        return f"others disturbed its times: {why_not_calibrated(history)}; a quiet machine would do"

    def _spoil_unjudged(self, found: Sequence[Run]) -> None:
        """Spoil disturbed runs of a command that was killed before it looked at what they had left."""
        for run in found:
            if run.ended:
                self._disturbed(run)

    def _job(self, experiment: Experiment, run: Run, own: Sequence[str], given: Typed, parent: str | None) -> list[str]:
        """The overrides of a run."""
        overrides = [*experiment.overrides, *experiment.arms[run.arm].overrides]
        more = [*own, f"seed={run.seed}", "resume=auto", f"hydra.sweep.dir={_quoted(self.directory)}"]
        more += [f"hydra.sweep.subdir={run.seed}/{run.arm}"]
        if parent is not None:
            more.append(f"tracking.parent_run_id={parent}")
        if run.after is not None:
            epochs = run_states.epochs_in_the_same_seconds(run.after.history())
            more += [f"architecture={_quoted(run.after.directory / 'last.pt')}", f"epochs={epochs}"]
            more += ["model.weights=null"] * any(key.lstrip("+").startswith("model.weights=") for key in overrides)
        return merged(given.aside, overrides, more)


def check_failures(failures: Mapping[Run, str], total: int) -> None:
    """Raise a `UserError` if any of all runs have failed."""
    for run, why in failures.items():
        count = f"{len(failures)} of {total} runs failed, as {run}"
        raise UserError(f"{count}: {why}; the same command repeats them, {run.directory} has its log")


def _quoted(path: Path) -> str:
    """As a value of an override."""
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what runs print from a table of runs: each has it in its own log."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict):
        name = next(name for name in (*before, *now) if before.get(name) != now.get(name))
        return f"{key}.{name}={before.get(name)} and is now given {now.get(name)}"
    return f"{key}={before} and is now given {now}"
