"""One experiment as a section of the report: its answer, what it rests on, and what one has to know to doubt it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from morphtrain.evidence import alike, analyses, formats, words
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.progress import Progress
from morphtrain.evidence.records import ends
from morphtrain.evidence.section import Section
from morphtrain.report.svg import inline
from morphtrain.report.tables import Column, Shown, shown
from morphtrain.schema import CONF
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

SAME_MACHINE = ("host", "processor", "threads", "device")  # what times depend on
CODE = ("morphtrain_commit", "torch", "python")
TESTS = {
    "pays": "accuracy against seconds, read against the curve of the dense arms",
    "ratio": "paired ratios to the first arm",
    "no_worse": "differences to the first arm beside the margin (non-inferiority)",
    "factor": "analysis of variance over the arms, then pairs with Holm's correction",
    "line": "least-squares line",
    "curves": "metrics over the epochs, differences at the end",
}


@dataclass(frozen=True)
class Question:
    """An experiment and its section; the properties are what the page shows. No two of a page have the same name."""

    name: str
    experiment: Experiment
    table: pd.DataFrame = field(repr=False)
    progress: Sequence[Progress]

    @cached_property
    def section(self) -> Section:
        return analyses.section(self.experiment, self.finished)

    @cached_property
    def finished(self) -> pd.DataFrame:
        """The records of the runs that count."""
        return self.table[self.table["finished"].astype(bool)]

    @property
    def anchor(self) -> str:
        return f"q-{self.name}"

    @property
    def title(self) -> str:
        return self.experiment.question

    @property
    def answer(self) -> str:
        return self.section.answer

    @property
    def is_open(self) -> bool:
        """Whether the answer may still change: runs are missing, or what decides cannot be told yet."""
        return self.section.is_open or not all(run.finished for run in self.progress)

    @property
    def test(self) -> str:
        return self.section.test

    @cached_property
    def picture(self) -> Markup | None:
        return None if self.section.picture is None else inline(self.section.picture, self.anchor)

    @property
    def caption(self) -> str:
        assert self.section.picture is not None
        return self.section.picture.title

    @property
    def results(self) -> list[Shown]:
        return [shown(table) for table in self.section.tables]

    @property
    def notes(self) -> list[str]:
        """What limits the answer: what is missing, disturbed, or ran elsewhere."""
        found = (
            *(self._missing(), self._alike(), self._spoilt(), self._contended()),
            *(self._mixed(), self._formats(), self._limits()),
        )
        return [note for note in found if note]

    def _alike(self) -> str:
        """Arms that are no different methods, or one computed in two ways."""
        groups = [words.listed(group) for group in alike.groups(self.finished, list(self.experiment.arms))]
        if not groups:
            return ""
        return (
            f"{'; '.join(groups)} came to the same numbers: if they are one method by two names, differences between "
            "their times are noise."
        )

    def _limits(self) -> str:
        limits = self.experiment.limits
        return f"What it cannot show: {limits}." if limits else ""

    def _spoilt(self) -> str:
        spoilt = [f"{run.arm} with seed {run.seed}" for run in self.progress if run.spoilt]
        if not spoilt:
            return ""
        return f"Failed or disturbed, and left out until it is repeated: {words.listed(spoilt)}."

    def _missing(self) -> str:
        missing = [run for run in self.progress if not run.finished]
        if not missing:
            return ""
        begun = sum(bool(run.machines) for run in missing)
        state = f"{begun} begun, {len(missing) - begun} not begun"
        have = "has" if len(missing) == 1 else "have"
        of = counted(len(self.progress), "run")
        return (
            f"Incomplete: {len(missing)} of {of} {have} not finished ({state}); the "
            "answer is about those that have, and may change."
        )

    def _contended(self) -> str:
        contended = [run for run in self.progress if run.contended]
        if not contended:
            return ""
        epochs = sum(run.contended for run in contended)
        of = sum(run.epochs for run in self.progress)
        uncalibrated = sum(not run.calibrated for run in contended)
        verdict = "calibrated times allow for it, raw ones do not"
        if uncalibrated:
            verdict = f"in {uncalibrated} of these calibrated times do not allow for it either"
        return (
            f"Others used the machine in {epochs} of {counted(of, 'epoch')}, in {len(contended)} of "
            f"{counted(len(self.progress), 'run')}; {verdict}."
        )

    def _mixed(self) -> str:
        machines = {_facts(machine, SAME_MACHINE) for run in self.progress for machine in run.machines}
        code = {machine.get("morphtrain_commit", "") for run in self.progress for machine in run.machines}
        mixed = f"Mixed machines: the runs come from {len(machines)}, so their times are not comparable."
        changed = f"Mixed code: the runs come from {len(code)} commits."
        processes = formats.mixed_processes(ends(self.finished))
        several = f"Mixed numbers of processes: {'; '.join(processes)}; their times are not comparable."
        return " ".join([mixed] * (len(machines) > 1) + [changed] * (len(code) > 1) + [several] * bool(processes))

    def _formats(self) -> str:
        first, last = next(iter(self.experiment.arms)), ends(self.finished)
        mixed, unlike = formats.mixed(last), formats.unlike(last, first)
        notes = [f"Mixed formats: auto chose differently in the runs of one arm ({'; '.join(mixed)})."] * bool(mixed)
        notes += [f"In other formats than {first}, as auto chose: {words.listed(unlike)}."] if unlike else []
        return " ".join(notes)

    @property
    def on_gpu(self) -> bool:
        machines = [machine for run in self.progress for machine in run.machines]
        return bool(machines) and all(machine.get("device", "").startswith("cuda") for machine in machines)

    @property
    def design(self) -> list[tuple[str, str]]:
        experiment = self.experiment
        terms = [
            ("Experiment", f"{experiment.name}, size {experiment.size}"),
            ("Analysis", f"{experiment.analysis}: {TESTS[experiment.analysis]}"),
            ("What decides", experiment.response + (f", against {experiment.x}" if experiment.x else "")),
            ("Margin", f"{experiment.margin:g}: a smaller difference would not matter"),
            ("Seeds", ", ".join(map(str, experiment.seeds)) + "; every arm has a run of each"),
            ("Overrides of all arms", " ".join(experiment.overrides)),
            ("In the thesis", experiment.thesis),
            ("What the thesis says", experiment.claim),
        ]
        return [(term, text) for term, text in terms if text]

    @property
    def arms(self) -> Shown:
        rows = tuple(
            (name, arm.role + (f" (the structure of {arm.of})" if arm.of else ""), " ".join(arm.overrides) or "none")
            for name, arm in self.experiment.arms.items()
        )
        columns = tuple(Column(name, False) for name in ("arm", "role", "overrides"))
        return Shown("The arms; the first is the one that others are compared with.", columns, rows)

    @property
    def runs(self) -> Shown:
        found = {(run.arm, run.seed): str(run) for run in self.progress}
        seeds = self.experiment.seeds
        columns = (Column("arm", False), *(Column(f"seed {seed}", False) for seed in seeds))
        rows = tuple((arm, *(found[arm, seed] for seed in seeds)) for arm in self.experiment.arms)
        return Shown("How far each run has come; contended: epochs in which others used the machine.", columns, rows)

    @property
    def machine(self) -> list[tuple[str, str]]:
        found = {
            name: list(dict.fromkeys(m[name] for run in self.progress for m in run.machines if name in m))
            for name in (*SAME_MACHINE, *CODE, "git_clean")
        }
        return [(name.replace("_", " "), "; ".join(values)) for name, values in found.items() if values] or [
            ("machine", words.UNKNOWN)
        ]

    @property
    def command(self) -> str:
        """Runs the experiment again as it was declared, with what was typed beside its name."""
        experiment = self.experiment
        seeds, overrides = _in_file(experiment)
        typed = [override for override in experiment.overrides if override not in overrides]
        typed += ["seed=" + ",".join(map(str, experiment.seeds))] if experiment.seeds != seeds else []
        own = [] if (directory := self._config_dir()) is None else ["--config-dir", directory]
        return "python -m morphtrain.run " + shlex.join(
            [*own, f"+experiment={experiment.name}", f"size={experiment.size}", *typed]
        )

    def _config_dir(self) -> str | None:
        """Where the options of the user's own were, as the first run that has begun was given it."""
        from omegaconf import OmegaConf

        paths = (Path(run) / ".hydra" / "hydra.yaml" for run in self.table["run"].unique())
        path = next((path for path in paths if path.exists()), None)
        sources: Any = None if path is None else OmegaConf.select(OmegaConf.load(path), "hydra.runtime.config_sources")
        return next((str(s.path) for s in sources or () if s.provider == "command-line"), None)


def _in_file(experiment: Experiment) -> tuple[tuple[int, ...], Sequence[str]]:
    """The seeds and overrides that an experiment's file has for its size; none of a file of one's own."""
    from omegaconf import OmegaConf

    path = CONF / "experiment" / f"{experiment.name}.yaml"
    if not path.exists():
        return (), ()
    size: Any = OmegaConf.select(OmegaConf.load(path), f"hydra.sweeper.sizes.{experiment.size}")
    return (tuple(size.seeds), tuple(size.get("overrides", ()))) if size is not None else (experiment.seeds, ())


def _facts(machine: dict[str, str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(machine.get(name, "") for name in names)
