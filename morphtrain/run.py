"""The command: compose a config, train, return the objective.

python -m morphtrain.run prune=prunetrain precision=o1
python -m morphtrain.run -m prune=none,prunetrain seed=1,2,3
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from morphtrain import interrupts, schema
from morphtrain.errors import UserError
from morphtrain.sweep import launcher_errors
from morphtrain.sweep.plugin import MorphTrainSweeper

Plugins.instance().register(MorphTrainSweeper)

# Errors of a place that cannot be written: no permission, no directory, no room, too large, read-only, over quota.
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT)

# Overrides that do not change what is computed, so a run's name leaves them out.
UNNAMED = ("tracking", "resume", "trial=", "objective=", "timing", "data.root=", "data.download=", "data.num_workers=")


@hydra.main(config_path=str(schema.CONF), config_name="config")
def job(composed: DictConfig) -> float | list[float]:
    """Train one run, alone or as a job of a multirun, and return its objective."""
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
    try:
        check_shadowed(settings)
        config = schema.parse(composed)
        tags = {group: settings.runtime.choices[group] for group in schema.OPTIONS}
        tags["study"] = study(settings)
        tags["name"] = run_name(settings, config)
        if config.trial is not None:
            tags["trial"] = str(config.trial)
        from morphtrain.trainer import train  # torch is slow to import; --help and --cfg do without it

        values = train(config, run_dir, tags, reporter(settings, config))
    except (UserError, OSError):
        discard_if_unused(run_dir)
        raise
    return values[0] if len(values) == 1 else values


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
    return str(settings.sweeper.get("study_name") or settings.sweep.dir)


def run_name(settings: Any, config: schema.Config) -> str:
    """A name that tells the run apart at a glance: the overrides typed, and always the model and the seed."""
    typed = [override for override in settings.overrides.task if not override.lstrip("+").startswith(UNNAMED)]
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
    schema.check(in_study, "trial", config.trial, "null; hydra/sweeper=morphtrain numbers its trials")
    from morphtrain.sweep.trial import TrialReporter

    return TrialReporter(settings.sweeper, config.trial, config.objective)


def discard_if_unused(run_dir: Path) -> None:
    """Remove a run directory in which training has left nothing."""
    entries = {entry.name for entry in run_dir.iterdir()} if run_dir.is_dir() else set()
    if entries <= {".hydra", "run.log", "environment.json"}:
        shutil.rmtree(run_dir, ignore_errors=True)


def main() -> None:
    """Run the command."""
    with_messages(job)


def with_messages(command: Callable[[], Any]) -> None:
    """Run a Hydra command; a user's mistake ends it with a message and exit code 1, a bug with a traceback."""
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra let errors through to here
    try:
        with interrupts.command():
            command()
    except (interrupts.Interrupted, interrupts.JobInterrupted) as interrupt:
        interrupts.leave(interrupt.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's code for a process ended by SIGINT
    except Exception as error:
        is_users = isinstance(error, (UserError, HydraException, OmegaConfBaseException, OSError))
        text = message(error) if is_users else launcher_errors.failed(error)
        if wants_traceback or text is None:
            raise
        sys.exit(text)


def message(error: Exception) -> str:
    """The error as a line or two, without a traceback."""
    if missing := launcher_errors.not_installed(error):
        return missing
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        hint = "; make room there, or choose another place with hydra.run.dir" if error.errno in UNWRITABLE else ""
        return f"{place}{error.strerror or str(error) or type(error).__name__}{hint}"
    cause = error.__cause__
    detail = f"\n{cause}" if isinstance(cause, OmegaConfBaseException) else ""
    return f"{error}{detail}"


if __name__ == "__main__":
    main()
