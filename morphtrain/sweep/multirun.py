"""The end of a multirun: what each configuration gave, over its seeds. Light to import; Hydra does so for every run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from morphtrain import interrupts
from morphtrain.evidence.calibration import is_calibrated, why_not_calibrated
from morphtrain.evidence.records import LEFT_AT_THE_END, is_immaterial, read_records
from morphtrain.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

OVERRIDES = Path(".hydra", "overrides.yaml")
CALIBRATED_CLOCK = "calibrated_train_seconds"


class Summary(Callback):
    """Prints a table of all configurations of a multirun, after its last job."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that was started, also if a job has failed or the user has interrupted it."""
        if isinstance(sys.exc_info()[1], (KeyboardInterrupt, interrupts.JobInterrupted)):
            return  # an interrupted command should end at once
        runs, unfinished = finished_runs(Path(config.hydra.sweep.dir))
        grid = config.hydra.runtime.choices["hydra/sweeper"] == "basic"
        if len(runs) > 1 and grid:
            from rich.console import Console

            console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
            console.print(table(runs, list(config.objective)))
            for line in notes(runs, unfinished):
                console.print(line, soft_wrap=True)


@dataclass(frozen=True)
class FinishedRun:
    """A run of a multirun: what it was started with, apart from the seed, and its records."""

    configuration: tuple[str, ...]
    seed: int
    reshapes: bool  # whether its network was meant to change
    history: list[dict[str, float]]

    @property
    def end(self) -> dict[str, float]:
        """The record of the last epoch."""
        return self.history[-1]

    @property
    def is_contended(self) -> bool:
        """Whether others have disturbed an epoch."""
        return any(record["contended"] for record in self.history)


def finished_runs(sweep_dir: Path) -> tuple[list[FinishedRun], int]:
    """The runs that a multirun has left in its directory, in their order, and the number of those that did not end."""
    found = (path.parent for path in sweep_dir.rglob("records.jsonl"))
    directories = [path for path in found if (path / OVERRIDES).exists()]  # not with hydra.output_subdir=null
    directories.sort(key=lambda path: (len(path.name), str(path)))  # 2 before 10
    ended = [path for path in directories if (path / LEFT_AT_THE_END).exists()]
    return [_read(path) for path in ended], len(directories) - len(ended)


def _read(run_dir: Path) -> FinishedRun:
    overrides = [str(override) for override in OmegaConf.load(run_dir / OVERRIDES)]
    config = OmegaConf.load(run_dir / ".hydra" / "config.yaml")
    named = (o for o in overrides if not o.lstrip("+").startswith("seed=") and not is_immaterial(o))
    reshapes = any(OmegaConf.select(config, f"{group}.name") != "none" for group in ("prune", "grow"))
    return FinishedRun(tuple(named), int(config.seed), reshapes, read_records(run_dir))


def table(runs: Sequence[FinishedRun], objective: Sequence[str]) -> Table:
    """A row for each configuration: how many runs, their means, and the time against the first configuration's."""
    from rich.table import Table

    from morphtrain.evidence.repeats import paired_ratio

    by_configuration: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run in runs:
        by_configuration.setdefault(run.configuration, []).append(run)
    clock = _clock(runs)
    wanted = [clock if name == "train_seconds" else name for name in objective]
    wanted += [clock, "median_epoch_seconds", "val_accuracy", "test_accuracy", "params"]
    shown = [name for name in dict.fromkeys(wanted) if all(name in run.end for run in runs)]
    has_ratio = len(by_configuration) > 1 and _times_compare(runs)
    rendered = Table(title=f"{len(runs)} runs of {counted(len(by_configuration), 'configuration')}")
    for column in ("configuration", "n", *shown, *(["time / first"] * has_ratio)):
        rendered.add_column(column, justify="left" if column == "configuration" else "right", overflow="fold")
    times = [{run.seed: run.end[clock] for run in group} for group in by_configuration.values()]
    common = set.intersection(*map(set, by_configuration)) if len(by_configuration) > 1 else set()
    for (configuration, group), seconds in zip(by_configuration.items(), times, strict=True):
        label = " ".join(override for override in configuration if override not in common)
        means = [_mean([run.end[name] for run in group]) for name in shown]
        ratio = [str(paired_ratio(seconds, times[0]) or "-")] if has_ratio else []  # "-": no seed in common
        rendered.add_row(label or "as it is", str(len(group)), *means, *ratio)
    return rendered


def _mean(values: Sequence[float]) -> str:
    from morphtrain.evidence.repeats import estimate

    found = estimate(values)
    if found.high is None or len(set(values)) == 1:
        return str(found)
    return f"{found.mean:.4g} ± {found.high - found.mean:.2g}"


def _clock(runs: Sequence[FinishedRun]) -> str:
    return CALIBRATED_CLOCK if all(CALIBRATED_CLOCK in run.end for run in runs) else "train_seconds"


def _times_compare(runs: Sequence[FinishedRun]) -> bool:
    """Whether nothing has disturbed the runs, or calibrated times allow for it."""
    contended = [run for run in runs if run.is_contended]
    return not contended or (_clock(runs) == CALIBRATED_CLOCK and all(is_calibrated(run.history) for run in contended))


def _why_not(runs: Sequence[FinishedRun]) -> str:
    if _clock(runs) != CALIBRATED_CLOCK:
        return "times do not compare (timing.reference=0)"
    why = next(filter(None, (why_not_calibrated(run.history) for run in runs if run.is_contended)))
    return f"times do not compare ({why})"


def notes(runs: Sequence[FinishedRun], unfinished: int) -> list[str]:
    """How to read the table, and what speaks against comparing the runs."""
    lines = ["±, [...]: 95 % confidence interval of the mean, from three runs on; (... to ...): both of two runs"]
    if _times_compare(runs):
        lines[0] += "; time / first: paired by seed, geometric mean"
    if unfinished:
        lines.append(f"left out, since they did not end: {counted(unfinished, 'run')}")
    if contended := sum(run.is_contended for run in runs):
        verdict = "calibrated times compare" if _times_compare(runs) else _why_not(runs)
        lines.append(f"{contended} of {len(runs)} runs had contended epochs: {verdict}")
    meant = [run for run in runs if run.reshapes]
    if unchanged := sum(not any(record.get("changed") for record in run.history) for run in meant):
        lines.append(
            f"{unchanged} of the {len(meant)} runs that were meant to change their network did not: see whether epochs "
            "reaches prune.start_epoch, grow.at_epochs or grow.patience, or raise prune.lasso_ratio"
        )
    return lines
