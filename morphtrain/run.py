"""The command: compose a config, train, return the objective.

python -m morphtrain.run prune=prunetrain precision=o1
python -m morphtrain.run -m prune=none,prunetrain seed=1,2,3 epochs=30
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from morphtrain import __version__, arguments, completion, config_errors, explained, interrupts, schema
from morphtrain.addresses import PasswordShown
from morphtrain.errors import UserError
from morphtrain.evidence.records import is_immaterial
from morphtrain.experiment.plugin import ExperimentSweeper
from morphtrain.processes import lead
from morphtrain.processes.place import is_follower
from morphtrain.sweep import launcher_errors
from morphtrain.sweep.plugin import MorphTrainSweeper
from morphtrain.wording import command_name

Plugins.instance().register(MorphTrainSweeper)
Plugins.instance().register(ExperimentSweeper)
# Hydra makes callbacks without saying which it trusts, and warns of it; conf/config.yaml names ours.
warnings.filterwarnings("ignore", message=r".* _target_='morphtrain\.sweep\.multirun\.Summary'")
warnings.filterwarnings(
    "ignore", message="Argument ``group`` is an experimental feature"
)  # of sampler/grouped_tpe.yaml
OmegaConf.register_resolver("explained", explained.config, replace=True)  # for hydra.help in conf/
OmegaConf.register_resolver("command_name", command_name, replace=True)

# Errors of a place that cannot be written: no permission, no directory, no room, too large, read-only, over quota.
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT)


@hydra.main(config_path=str(schema.CONF), config_name="config")
def job(composed: DictConfig) -> float | list[float]:
    """Train one run, alone or as a job of a multirun, and return its objective."""
    if is_follower():  # a task of Slurm, which gives the job to all tasks
        follow()
        return []
    settings = HydraConfig.get()
    if is_worker():
        interrupts.become_worker()
        try:
            return trained(composed, settings)
        except interrupts.Interrupted as interrupt:
            raise interrupts.JobInterrupted(interrupt.number) from None
    if settings.mode == RunMode.MULTIRUN:
        interrupts.check()
        return trained(composed, settings)
    with interrupts.at_once():  # until training begins, a single run has nothing to lose
        return trained(composed, settings)


def trained(composed: DictConfig, settings: Any) -> float | list[float]:
    """Train one run."""
    run_dir = Path(settings.runtime.output_dir)
    with past_hydra(settings.mode), nothing_left_by_mistakes(settings, run_dir), lead.leading():
        config = schema.parse(composed)
        check_shadowed(settings)
        if settings.mode == RunMode.MULTIRUN:
            config.timing.check_comparable("a multirun")  # arguments.py has seen what was typed, not what a preset says
        tags = {group: settings.runtime.choices[group] for group in schema.OPTIONS}
        tags["study"] = study(settings)
        tags["name"] = run_name(settings, config)
        if config.trial is not None:
            tags["trial"] = str(config.trial)
        values = lead.train(config, run_dir, tags, reporter(settings, config))
    return values[0] if len(values) == 1 else values


def follow() -> int:
    """Train what the first of several processes does; returns the exit code."""
    from morphtrain.processes import follow  # torch is slow to import; --help and --cfg do without it

    return follow.follow()


def is_worker() -> bool:
    """Whether this is a process that a launcher has started for jobs."""
    return multiprocessing.current_process().name != "MainProcess"


def check_shadowed(settings: Any) -> None:
    """Raise a `UserError` for an option file of the user's own that Hydra passes over for one of MorphTrain's."""
    for group in schema.OPTIONS:
        option = f"{group}/{settings.runtime.choices[group]}.yaml"
        for directory in schema.own_directories(settings.runtime):
            if (directory / option).exists() and (schema.CONF / option).exists():
                raise UserError(f"{directory / option}: MorphTrain has an option of that name; give yours another one")


def study(settings: Any) -> str:
    """The name shared by the runs of one sweep: the study's name or the sweep's directory; "none" for a single run."""
    if settings.mode != RunMode.MULTIRUN:
        return "none"
    name = settings.sweeper.get("study_name")
    return str(settings.sweep.dir if name is None else name)


def run_name(settings: Any, config: schema.Config) -> str:
    """A name that tells the run apart at a glance: the overrides typed, and always the model and the seed."""
    typed = [override for override in settings.overrides.task if not is_immaterial(override)]
    typed.sort(key=lambda override: override.startswith("seed="))  # a grid has it first
    keys = {override.partition("=")[0].lstrip("+") for override in typed}
    model = [] if "model" in keys else [settings.runtime.choices["model"]]
    seed = [] if "seed" in keys else [f"seed={config.seed}"]
    trial = "" if config.trial is None else f"trial {config.trial}: "
    return trial + " ".join([*model, *typed, *seed])


def reporter(settings: Any, config: schema.Config) -> Callable[[Mapping[str, float]], bool] | None:
    """The callback by which a trial of `hydra/sweeper=morphtrain` reports every epoch; None for other runs."""
    if config.trial is None:
        return None
    in_study = settings.mode == RunMode.MULTIRUN and "pruner" in settings.sweeper  # no other sweeper has one
    from morphtrain.sweep.trial import NO_NUMBER, TrialReporter

    schema.check(in_study, "trial", config.trial, NO_NUMBER)

    return TrialReporter(settings.sweeper, config.trial, config.objective, config.epochs, config.reshapes)


@contextmanager
def nothing_left_by_mistakes(settings: Any, run_dir: Path) -> Iterator[None]:
    """After a mistake, remove the run directory if training has left nothing there but Hydra's files of the config."""
    try:
        yield
    except (UserError, OSError, OmegaConfBaseException) as error:
        discard_if_only(run_dir, {".hydra", "run.log", "environment.json"})
        if isinstance(error, PasswordShown) and settings.mode == RunMode.MULTIRUN:
            Path(settings.runtime.cwd, settings.sweep.dir, "multirun.yaml").unlink(missing_ok=True)
        raise


def discard_if_only(directory: Path, names: set[str]) -> None:
    """Remove a directory that holds nothing but entries of these names."""
    if directory.is_dir() and {entry.name for entry in directory.iterdir()} <= names:
        shutil.rmtree(directory, ignore_errors=True)


class Mistake(BaseException):
    """What its cause says, on its way past Hydra."""


@contextmanager
def past_hydra(mode: RunMode | None) -> Iterator[None]:
    """Let what a message is about pass Hydra in a single run: it would announce it with a line of its own."""
    try:
        yield
    except (UserError, OSError, OmegaConfBaseException) as error:
        if mode == RunMode.RUN:
            raise Mistake from error
        raise


@contextmanager
def behind_hydra() -> Iterator[None]:
    """Turn a mistake that has passed Hydra into itself again."""
    try:
        yield
    except Mistake as passed:
        assert passed.__cause__ is not None
        raise passed.__cause__ from passed.__cause__.__cause__


def main() -> None:
    """Run the command."""
    with_messages(run)


def run() -> None:
    """Compose a run and train it, or follow the process that does."""
    if arguments.only_show(sys.argv[1:]):
        if not is_follower():
            through_hydra("run", job)
    elif is_follower():
        sys.exit(follow())
    else:
        with lead.leading():
            through_hydra("run", job)


def through_hydra(name: str, job: Callable[[], Any]) -> None:
    """Run the job of a command whose words Hydra reads, after a check of these."""
    if "--version" in sys.argv[1:]:
        print(f"MorphTrain {__version__}, Hydra {hydra.__version__}")
        return
    words = arguments.prepared(sys.argv[1:])
    if not {"--shell-completion", "-sc"}.isdisjoint(words):
        print(completion.by_hydras_flag(words))
        return
    sys.argv = [command_name(name), *words]  # Hydra's help names the command
    with behind_hydra():
        job()


def with_messages(command: Callable[[], Any]) -> None:
    """Run a command; a user's mistake ends it with a message and exit code 1, a bug with a traceback."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra let errors through to here
    try:
        with interrupts.command():
            command()
    except (interrupts.Interrupted, interrupts.JobInterrupted) as interrupt:
        interrupts.leave(interrupt.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's code for a process ended by SIGINT
    except Exception as error:
        text = message(error)
        if wants_traceback or text is None:
            raise
        sys.exit(text)


def message(error: Exception) -> str | None:
    """The error as a line, without a traceback; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if text := launcher_errors.not_installed(error) or config_errors.one_line(error):
        return text
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        hint = "; make room there, or choose another place with hydra.run.dir" if error.errno in UNWRITABLE else ""
        return f"{place}{error.strerror or str(error) or type(error).__name__}{hint}"
    return launcher_errors.failed(error)


if __name__ == "__main__":
    main()
