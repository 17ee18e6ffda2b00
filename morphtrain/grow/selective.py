"""PruneTrain as MorphNet: grow only where the regulariser did not shrink."""

from __future__ import annotations

import logging
from typing import Any

from morphtrain import schema
from morphtrain.grow.kept import kept_spaces
from morphtrain.grow.regrowth import Regrowth
from morphtrain.grow.when import When
from morphtrain.method import Method
from morphtrain.state import Run

log = logging.getLogger(__name__)


class Selective(Method):
    """The method as hooks of the training loop; `kept.grow_where_kept` is its functional form."""

    follows_channels = True

    def __init__(self, config: schema.grow.Selective) -> None:
        self.config = config
        self.when = When(config)
        self.regrowth = Regrowth(config)
        self.target = 0.0  # in the unit of config.cost

    def before_training(self, run: Run) -> None:
        if run.epoch == 0:
            self.regrowth.start(run)
            self.target = self.config.target * self.regrowth.cost(run)

    def after_epoch(self, run: Run) -> None:
        reason = self.when.due(run)
        if not reason:
            return
        self.when.grown_at.append(run.epoch)
        kept = kept_spaces(run.graph, self.regrowth.reference, self.config.keep_fraction)
        share = f"{len(kept)} of {len(run.graph.spaces)} spaces kept {self.config.keep_fraction:g} of their channels"
        before = self.regrowth.cost(run)
        growth = self.regrowth.grow(run, self.target)
        what = growth.summary() or "nothing grew"
        numbers = f"{self.config.cost} {before:.4g} -> {self.regrowth.cost(run):.4g} of {self.target:.4g}"
        log.info("grow=selective: %s; %s; %s; %s", reason, share, what, numbers)
        if growth:
            run.shape_changed(f"{what} ({reason}; {share})")
            run.rewarm(self.config.rewarm_epochs)

    def after_change(self, run: Run) -> None:
        self.regrowth.follow(run)

    def state_dict(self) -> dict[str, Any]:
        return {"grown_at": self.when.grown_at, "target": self.target, "regrowth": self.regrowth.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.when.grown_at, self.target = list(state["grown_at"]), state["target"]
        self.regrowth.load_state_dict(state["regrowth"])


def build(config: schema.grow.Selective) -> Selective:
    return Selective(config)
