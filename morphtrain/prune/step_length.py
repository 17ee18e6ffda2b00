"""How far a step's penalty reaches: what a proximal step has to take off."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from morphtrain.errors import UserError
from morphtrain.state import Run

log = logging.getLogger(__name__)

SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg")  # of amsgrad, of Adam and its kin, of RMSprop
STEP_KEYS = ("lr", "momentum", "betas", "eps", "step")  # of a parameter group, that its steps depend on
POINTS = 100  # of an epoch at most, in which its learning rate is looked up


def step_length(optimizer: Optimizer, weight: torch.Tensor) -> Any:
    """How far a step of this weight goes along a gradient that stays the same: lr / (1 - momentum).

    Momentum repeats a gradient 1 / (1 - momentum) times in all, so a threshold has to do the same. Adam averages
    gradients instead of adding them up, and divides them by sqrt(v) + eps. An optimizer may say how far it goes: its
    method `step_size(weight)`, if it has one, returns what it has just multiplied this weight's gradient by.
    Elements that learn at a rate of their own after a growth go less far, or farther: by `Additions.factor`.

    Returns:
        A number; a scalar tensor where the optimizer computes the length on its device; or one of the weight's shape
        where it scales the steps of its elements, as Adam does.
    """
    group = _group_of(optimizer, weight)
    own = getattr(optimizer, "step_size", None)
    lr = group["lr"] * _scale(optimizer.state.get(weight, {}), group) if own is None else own(weight)
    return lr / (1 - group.get("momentum", 0.0))


def warn_if_unknown(optimizer: Optimizer) -> None:
    """Say that steps are longer or shorter than `step_length`, if the optimizer scales them by something unknown."""
    scaled = any(name in state for state in optimizer.state.values() for name in SECOND_MOMENTS)
    if not scaled and not isinstance(optimizer, SGD) and not hasattr(optimizer, "step_size"):
        log.warning(
            "optimizer=custom: how far the steps of %s go is not known, and it has no method step_size(parameter); the "
            "penalty takes lr times the gradient, so prune.lasso_ratio may need another value",
            type(optimizer).__name__,
        )


def full_steps(run: Run, last_epoch: int) -> float:
    """How many steps at the full learning rate are as long as all from now to the end of `last_epoch`, as planned now.

    The rate is that of the first parameter group that has one above 0. An epoch that leaves images out has fewer steps,
    and each of them counts `run.step_weight` times.

    Raises:
        UserError: if the optimizer has no such group.
    """
    steps, done = -(-len(run.data.train) // run.batch_size), round(run.progress)  # of an epoch; epochs
    points, group = min(steps, POINTS), _first_trained(run)
    times = [epoch + (i + 0.5) / points for epoch in range(done, last_epoch) for i in range(points)]
    return sum(run.learning_rate(time, group) for time in times) / run.base_lrs[group] * steps / points


def steps_ahead(run: Run, last_epoch: int) -> float:
    """How many steps like the present one are as long as all from now to the end of `last_epoch`, as planned now."""
    group = _first_trained(run)
    now = run.optimizer.param_groups[group]["lr"] / run.base_lrs[group]
    return full_steps(run, last_epoch) / now if now else math.inf


def _first_trained(run: Run) -> int:
    """The number of the first parameter group that is trained."""
    for number, rate in enumerate(run.base_lrs):
        if rate > 0:
            return number
    raise UserError(f"optimizer={run.config.optimizer.name}: no learning rate is above 0, so nothing is trained")


def _scale(state: dict[str, Any], group: dict[str, Any]) -> Any:
    """1 / (sqrt(v) + eps), with v corrected for its start at zero; 1 where gradients are not scaled."""
    name = next((name for name in SECOND_MOMENTS if name in state), None)
    if name is None:
        return 1.0
    correction: Any = 1.0
    if "betas" in group:
        correction = 1 - group["betas"][1] ** state.get("step", group.get("step", 1))
    return ((state[name] / correction).sqrt() + group.get("eps", 1e-8)).reciprocal()


def _group_of(optimizer: Optimizer, weight: torch.Tensor) -> dict[str, Any]:
    """The parameter group that a weight is in, or the first if it makes no difference."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    first, *others = ([group.get(key) for key in STEP_KEYS] for group in groups)
    if all(other == first for other in others):
        return groups[0]
    return next(group for group in groups if any(p is weight for p in group["params"]))
