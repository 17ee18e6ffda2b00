"""The accuracy below which a trial is infeasible: a number, or what the baseline reached and how much less will do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.sweep.attributes import Attributes

KEY = "hydra.sweeper.min_accuracy"
RELATIVE = re.compile(r"baseline\s*(?:-\s*(\d*\.?\d+))?")
WANTED = "from 0 to 1, or baseline, or baseline-0.01 (0.01 below trial 0's), or null"


@dataclass(frozen=True)
class Floor:
    """The lowest final `val_accuracy` (0..1) of a feasible trial; if `relative`, how much below trial 0's that is."""

    value: float
    relative: bool = False

    def is_known(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether the trial that it depends on, if it does, has ended."""
        return not self.relative or (len(trials) > 0 and trials[0].state.is_finished())

    def accuracy(self, trials: Sequence[FrozenTrial]) -> float:
        """The floor itself, once it is known."""
        return Attributes(_baseline(trials)).metrics["val_accuracy"] - self.value if self.relative else self.value

    def excess(self, accuracy: float, trials: Sequence[FrozenTrial]) -> float:
        """By how much a final accuracy is too low, as a constraint: 0 or less if it is not."""
        return self.accuracy(trials) - accuracy

    def check_baseline(self, trials: Sequence[FrozenTrial]) -> None:
        """Raise a `UserError` if the floor depends on a baseline that has failed, or that the study does not have."""
        if not self.relative or not trials:
            return
        baseline = _baseline(trials)
        failed = baseline.state == TrialState.FAIL
        if failed or (baseline.state.is_finished() and "val_accuracy" not in Attributes(baseline).metrics):
            reason = Attributes(baseline).error or "no val_accuracy is stored"
            raise UserError(f"{KEY}: relative to the baseline, which has failed ({reason}); a number works without it")


def _baseline(trials: Sequence[FrozenTrial]) -> FrozenTrial:
    if not Attributes(trials[0]).is_baseline:
        raise UserError(f"{KEY}: relative to the baseline, and trial 0 is none here; a number works without it")
    return trials[0]


def parse_floor(text: Any) -> Floor | None:
    """The floor of key `hydra.sweeper.min_accuracy`; None for null.

    Raises:
        UserError: for a value that is neither null, a number from 0 to 1, nor relative to the baseline.
    """
    if text is None:
        return None
    relative = RELATIVE.fullmatch(text.strip()) if isinstance(text, str) else None
    number = float(relative[1] or 0) if relative else text
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    schema.check(is_number and 0 <= number <= 1, KEY, text, WANTED)
    return Floor(float(number), relative is not None)
