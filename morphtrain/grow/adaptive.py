"""Grow, prune and lower the learning rate by rules instead of a plan: PruneTrain as MorphNet in a closed loop."""

from __future__ import annotations

import logging
from typing import Any

from morphtrain import schema
from morphtrain.grow.decision import Decision, Rules, Situation, decide
from morphtrain.grow.regrowth import Regrowth
from morphtrain.method import Method
from morphtrain.state import Run

log = logging.getLogger(__name__)

STATE = ("decided_at", "structure_at", "best", "lr_lowered")
FULL = 0.95  # share of the limits beyond which there is no room to grow


class Adaptive(Method):
    """The method as hooks of the training loop; `decision.decide` holds the rules."""

    follows_channels = True

    def __init__(self, config: schema.grow.Adaptive) -> None:
        self.config = config
        self.rules = Rules(
            config.patience, config.smoothing, config.low_accuracy, config.high_accuracy, config.keep_fraction
        )
        self.regrowth = Regrowth(config)
        self.decided_at = 0  # the epoch after which the last decision was made
        self.structure_at = 0  # the one after which the structure, or the penalty on it, last changed
        self.best = 0.0  # best validation accuracy before that
        self.lr_lowered = False  # since then

    def before_training(self, run: Run) -> None:
        if run.epoch == 0:
            self.regrowth.start(run)

    def after_epoch(self, run: Run) -> None:
        if run.config.epochs - run.epoch < self.config.patience:
            return  # too few epochs are left to train what would change now
        now = self._situation(run)
        decision = decide(now, self.rules)
        if decision.action == "wait":
            return
        done = self._act(run, decision)
        log.info("grow=adaptive: epoch %d: %s: %s; %s", run.epoch, decision.action, decision.reason, done)
        run.note(f"{decision.action}: {decision.reason}")
        self.decided_at = run.epoch

    def _situation(self, run: Run) -> Situation:
        latest: dict[str, float] = {"train_loss": run.train_loss, "train_accuracy": run.train_accuracy}
        reference = sum(self.regrowth.reference.values())
        since = [record["val_accuracy"] for record in run.history[self.structure_at :]]
        return Situation(
            history=[*run.history[self.decided_at :], latest],
            kept=sum(space.size for space in run.graph.spaces) / reference,
            can_grow=self.regrowth.share_of_limits(run, run.graph)({}) < FULL,
            can_prune=bool(penalised(run)),
            lr_lowered=self.lr_lowered,
            helped=max(since, default=1.0) > self.best,
        )

    def _act(self, run: Run, decision: Decision) -> str:
        """Carry out the decision; returns what was done, in numbers."""
        if decision.action == "stop":
            run.stopped = True
            return "training ends"
        if decision.action == "lower_lr":
            run.lr_factor *= self.config.lr_factor
            self.lr_lowered = True
            return f"learning rate times {self.config.lr_factor:g}"
        self.lr_lowered, self.structure_at = False, run.epoch
        self.best = max((record["val_accuracy"] for record in run.history), default=0.0)
        if decision.action == "prune":
            return ", ".join(self._penalise_more(method) for method in penalised(run))
        before = self.regrowth.cost(run)
        growth = self.regrowth.grow(run, self.config.step * before)
        if growth:
            run.shape_changed(growth.summary())
            run.rewarm(self.config.rewarm_epochs)
        return f"{growth.summary() or 'nothing grew'}; {self.config.cost} {before:.4g} -> {self.regrowth.cost(run):.4g}"

    def _penalise_more(self, method: Method) -> str:
        assert method.penalty_weight is not None
        before, method.penalty_weight = method.penalty_weight, method.penalty_weight * self.config.lasso_factor
        return f"penalty weight {before:.4g} -> {method.penalty_weight:.4g}"

    def after_change(self, run: Run) -> None:
        self.regrowth.follow(run)

    def state_dict(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in STATE}
        return {**own, "regrowth": self.regrowth.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in STATE:
            setattr(self, key, state[key])
        self.regrowth.load_state_dict(state["regrowth"])


def penalised(run: Run) -> list[Method]:
    """The methods that add a penalty to the loss."""
    return [method for method in run.methods.values() if method.penalty_weight is not None]


def build(config: schema.grow.Adaptive) -> Adaptive:
    return Adaptive(config)
