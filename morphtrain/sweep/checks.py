"""Which keys of a sweep go together; checked before the first trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.pruners import NopPruner

from morphtrain.errors import UserError
from morphtrain.evidence.analyses.values import scale
from morphtrain.evidence.comparisons import RATIO
from morphtrain.sweep.overtaken import CLOCKS, Overtaken

MINIMIZED = ["minimize"]  # the directions of one metric


def check_directions(directions: Sequence[str], objective: Sequence[str]) -> None:
    """Raise a `UserError` unless each metric has a direction."""
    if len(directions) != len(objective):
        raise UserError(
            f"hydra.sweeper.direction={directions}: objective={objective} has {len(objective)} metrics; give one "
            "direction, minimize or maximize, for each"
        )


def check_pruner(pruner: Any, directions: Sequence[str], objective: Sequence[str]) -> None:
    """Raise a `UserError` for a pruner that cannot judge trials by this objective."""
    if len(objective) > 1 and not isinstance(pruner, NopPruner):
        raise UserError(
            f"hydra/sweeper/pruner: objective={objective} has more than one metric, and Optuna can "
            "stop trials early by only one; hydra/sweeper/pruner=none works"
        )
    if isinstance(pruner, Overtaken) and not (objective[0] in CLOCKS and directions == MINIMIZED):
        raise UserError(
            f"hydra/sweeper/pruner=overtaken: objective={objective[0]} is no time to be minimized that only grows, as "
            f"{', '.join(CLOCKS)} are; hydra/sweeper/pruner=median works"
        )


def check_confirm(best: int, directions: Sequence[str], objective: Sequence[str]) -> None:
    """Raise a `UserError` if the best trials are to run again, and ratios of this objective say nothing."""
    if best and not (len(objective) == 1 and directions == MINIMIZED and scale(objective[0]) == RATIO):
        raise UserError(
            f"hydra.sweeper.confirm.best={best}: compares ratios of one metric that is minimized, as a time, and "
            f"objective={objective}; 0 works"
        )
