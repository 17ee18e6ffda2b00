"""Net2WiderNet while training: more channels, the same function (Chen et al. 2015, arXiv 1511.05641)."""

from __future__ import annotations

import logging
from typing import Any

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.grow.expand import widest
from morphtrain.grow.limits import share_of_limits
from morphtrain.grow.net2net import widen
from morphtrain.grow.size import Cost, check_memory
from morphtrain.grow.when import When
from morphtrain.method import Method
from morphtrain.morph import Space, matches
from morphtrain.state import Run
from morphtrain.wording import counted

log = logging.getLogger(__name__)


class Wider(Method):
    """The method as hooks of the training loop; `net2net.widen` is its functional form."""

    follows_channels = True

    def __init__(self, config: schema.grow.Wider) -> None:
        self.config = config
        self.when = When(config)

    def before_training(self, run: Run) -> None:
        if run.epoch > 0:  # pruning may have taken what there was
            return
        if not self._spaces(run):
            names = ", ".join(space.name for space in run.graph.spaces)
            raise UserError(f"grow.where={self.config.where}: matches no channel space of the model; there are {names}")
        self.when.check_reach(run)
        check_memory(run.graph, self._widths(run), f"grow.factor={self.config.factor:g}")

    def after_epoch(self, run: Run) -> None:
        reason = self.when.due(run)
        if not reason:
            return
        if self._limits(run)({}) > 1:
            log.info("grow=wider: %s, but the network is as large as grow.max_params and max_macs allow", reason)
            return
        with run.growing(self.config.new_lr_factor, self.config.new_lr_epochs):
            grown = widen(
                run.graph,
                target={space.name: width for space, width in self._widths(run).items()},
                noise=self.config.noise,
                generator=run.generator(run.epoch),
                optimizer=run.optimizer,
            )
        self.when.grown_at.append(run.epoch)
        if grown:
            added = sum(after - before for before, after in grown.values())
            run.shape_changed(f"widened {counted(len(grown), 'space')} by {counted(added, 'channel')} ({reason})")
            run.rewarm(self.config.rewarm_epochs)

    def state_dict(self) -> dict[str, Any]:
        return {"grown_at": self.when.grown_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.when.grown_at = list(state["grown_at"])

    def _limits(self, run: Run) -> Cost:
        return share_of_limits(run, run.graph, self.config.max_params, self.config.max_macs)

    def _widths(self, run: Run) -> dict[Space, int]:
        """The widths that a growth would give the spaces now."""
        return widest(self._limits(run), self._spaces(run), target=1.0, most=self.config.factor)

    def _spaces(self, run: Run) -> list[Space]:
        return [s for s in run.graph.spaces if not s.is_ambiguous and matches(s.name, self.config.where)]


def build(config: schema.grow.Wider) -> Wider:
    return Wider(config)
