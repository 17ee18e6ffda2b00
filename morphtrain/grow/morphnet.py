"""MorphNet's expansion (Gordon et al. 2018, arXiv 1711.06798, algorithm 1): shrink, widen all to the target, repeat."""

from __future__ import annotations

import logging
from typing import Any, cast

from morphtrain import schema
from morphtrain.cost import CostKind
from morphtrain.cost.latency import Terms, known_terms
from morphtrain.grow.expand import expand_to
from morphtrain.method import Method
from morphtrain.state import Run
from morphtrain.wording import counted

log = logging.getLogger(__name__)


class MorphNetExpansion(Method):
    """The method as hooks of the training loop; `expand.expand_to` is its functional form."""

    follows_channels = True

    def __init__(self, config: schema.grow.MorphNetExpansion) -> None:
        self.config, self.kind = config, cast(CostKind, config.cost)
        self.target = 0.0  # in the unit of config.cost
        self.latency: Terms = {}  # measured so far, if that is the cost

    def before_training(self, run: Run) -> None:
        if run.epoch > 0:
            return
        self.target = self.config.target * run.width_cost(self.kind, self.latency)()

    def after_epoch(self, run: Run) -> None:
        number, rest = divmod(run.epoch, self.config.round_epochs)
        if rest or not 1 <= number <= self.config.rounds:
            return
        cost = run.width_cost(self.kind, self.latency)
        before = cost()
        if before > self.target:
            log.info(
                "grow=morphnet: round %d: %s %.4g is above the target of %.4g",
                number,
                self.config.cost,
                before,
                self.target,
            )
            return
        grown = expand_to(
            run.graph,
            cost,
            self.target,
            noise=self.config.noise,
            generator=run.generator(run.epoch),
            optimizer=run.optimizer,
        )
        added = sum(after - before for before, after in grown.values())
        log.info(
            "grow=morphnet: round %d: %s %.4g -> %.4g of %.4g", number, self.config.cost, before, cost(), self.target
        )
        if grown:
            run.shape_changed(f"round {number}: widened {counted(len(grown), 'space')} by {counted(added, 'channel')}")
        if not self.config.inherit:
            run.reset_weights()
        if grown or not self.config.inherit:
            run.rewarm(self.config.rewarm_epochs)

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target, "latency": self.latency}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.target, self.latency = state["target"], known_terms(state, "grow.cost")


def build(config: schema.grow.MorphNetExpansion) -> MorphNetExpansion:
    return MorphNetExpansion(config)
