"""The accuracy below which a trial is infeasible: a number, or what the baseline reached and how much less will do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.sweep.trial import BASELINE_ATTR, ERROR_ATTR, METRICS_ATTR

KEY = "hydra.sweeper.min_accuracy"
RELATIVE = re.compile(r"baseline\s*(?:-\s*(\d*\.?\d+))?")
WANTED = "from 0 to 1, or baseline, or baseline-0.01 (0.01 below trial 0's), or null"


@dataclass(frozen=True)
class Floor:
    """The lowest final `val_accuracy` (0..1) of a feasible trial; if `relative`, how much below trial 0's that is."""

    value: float
    relative: bool = False

    def excess(self, accuracy: float, trials: Sequence[FrozenTrial]) -> float:
        """By how much a final accuracy is too low, as a constraint: 0 or less if it is not."""
        if not self.relative:
            return self.value - accuracy
        reached = float(_baseline(trials).user_attrs[METRICS_ATTR]["val_accuracy"])
        return reached - self.value - accuracy

    def check_baseline(self, trials: Sequence[FrozenTrial]) -> None:
        """Raise a `UserError` if the floor depends on a baseline that has failed."""
        if self.relative and _baseline(trials).state == TrialState.FAIL:
            reason = _baseline(trials).user_attrs.get(ERROR_ATTR)
            raise UserError(f"{KEY}: relative to the baseline, which has failed ({reason}); a number works without it")


def _baseline(trials: Sequence[FrozenTrial]) -> FrozenTrial:
    return next(trial for trial in trials if BASELINE_ATTR in trial.user_attrs)


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
