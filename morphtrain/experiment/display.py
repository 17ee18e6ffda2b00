"""What an experiment prints: its plan, and a line for each run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from morphtrain.errors import UserError
from morphtrain.evidence.experiment import Experiment
from morphtrain.experiment.runs import Run, kind_of
from morphtrain.wording import one_of_all


def show_plan(experiment: Experiment, found: Sequence[Run], directory: Path) -> None:
    """Print what is asked, which runs answer it, and how many of them are left."""
    left = sum(not run.ended for run in found)
    print(f"{experiment.name}, size={experiment.size}: {experiment.question}")
    if experiment.limits:
        print(f"  {experiment.limits}")
    for name, arm in experiment.arms.items():
        of = f" of {arm.of}" if arm.of else ""
        print(f"  {name}: {arm.role}{of} {' '.join(arm.overrides)}".rstrip())
    print(f"  for all: {' '.join(experiment.overrides)}")
    seeds = f"seeds {', '.join(map(str, experiment.seeds))}"
    print(f"  {len(found)} runs in {directory}, {seeds}; ended: {len(found) - left}, left: {left}", flush=True)


class Clock:
    """A line per run, with the time that is left as those before it took theirs, and each arm's warnings once.

    Args:
        left: number of runs to go.
        total: and of all.
    """

    def __init__(self, left: int, total: int) -> None:
        self.begun, self.left, self.to_do, self.total = time.monotonic(), left, left, total
        self.warned: set[tuple[str, str]] = set()

    def show(self, run: Run, response: str, why: str | UserError | None, again: bool) -> None:
        """Print how a run has ended; `why` it does not count, and whether it runs again."""
        self.left -= not again
        done = self.to_do - self.left
        if why is not None:
            text = f" {why}" + ("; once more" if again else "")
        else:
            end = run.history()[-1]
            shown = dict.fromkeys((response, "calibrated_train_seconds", "test_accuracy", "params"))
            text = "".join(f"  {metric} {end[metric]:.6g}" for metric in shown if metric in end)
        left = (time.monotonic() - self.begun) / done * self.left if done and self.left else None
        print(one_of_all(self.total - self.left, self.total, run, text, left), flush=True)
        for warning in run.warnings() if why is None else ():
            kind = (run.arm, kind_of(warning))
            if kind not in self.warned:
                self.warned.add(kind)
                print(f"          warning of {run.arm}: {warning}", flush=True)
