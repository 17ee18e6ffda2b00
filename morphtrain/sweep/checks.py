"""Which keys of a sweep go together; checked before the first trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.pruners import NopPruner
from optuna.samplers import CmaEsSampler, GPSampler, QMCSampler

from morphtrain.errors import UserError
from morphtrain.evidence.analyses.values import scale
from morphtrain.evidence.comparisons import RATIO
from morphtrain.sweep.overtaken import CLOCKS, Overtaken
from morphtrain.sweep.search_space import Branch

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


def check_sampler(sampler: Any, branches: Sequence[Branch]) -> None:
    """Raise a `UserError` for a sampler that is not safe, or would draw at random what it is there to choose.

    Args:
        branches: keys that only some trials have.
    """
    if isinstance(sampler, CmaEsSampler):
        raise UserError(
            "hydra/sweeper/sampler=cmaes: Optuna keeps this one's state in the study as a pickle, by which whoever "
            "can write to the study could run code here; tpe, gp, nsgaii, nsgaiii, qmc, random or grid works"
        )
    some = [(branch, key) for branch in branches for key in branch.distributions]
    if some and isinstance(sampler, (GPSampler, QMCSampler)):
        branch, key = some[0]
        name = "gp" if isinstance(sampler, GPSampler) else "qmc"
        raise UserError(
            f"hydra/sweeper/sampler={name}: only trials with {branch.key}={branch.option} have {key}, and this sampler "
            "would draw such keys at random; grouped_tpe works"
        )
