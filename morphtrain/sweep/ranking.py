"""Which trials of a study are the best, and their values as a sweep shows them."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from morphtrain.schema.config import TO_ACCURACY
from morphtrain.sweep.comparison import completed, is_feasible
from morphtrain.timing.summaries import NEVER


def best_trials(study: optuna.Study, most: int) -> list[FrozenTrial]:
    """The feasible trials that count: the Pareto front or, with one objective, the `most` best, best first."""
    return study.best_trials if len(study.directions) > 1 else ranked(study)[:most]


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """The feasible trials, the best first."""
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    return sorted(filter(is_feasible, completed(study)), key=lambda trial: sign * trial.values[0])


def short(value: Any) -> str:
    """A value with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def value_of(name: str, value: float) -> str:
    """A metric's value; of a time to an accuracy that was not reached, what it lacks."""
    missed = name in TO_ACCURACY and value >= NEVER
    return f"missed by {value / NEVER - 1:.4f}" if missed else short(value)
