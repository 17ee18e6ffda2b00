"""Net2DeeperNet while training: more layers, the same function (Chen et al. 2015, arXiv 1511.05641)."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.grow.limits import share_of_limits
from morphtrain.grow.net2deeper import insert_block_like, layer_places
from morphtrain.grow.when import When
from morphtrain.method import Method
from morphtrain.morph import ChannelGraph, matches
from morphtrain.state import Run

if TYPE_CHECKING:
    from torch.optim import Optimizer

log = logging.getLogger(__name__)


class Deeper(Method):
    """The method as hooks of the training loop; its functional form: `ChannelGraph.insert_layer`, `insert_block`."""

    follows_channels = True

    def __init__(self, config: schema.grow.Deeper) -> None:
        self.config = config
        self.when = When(config)

    def before_training(self, run: Run) -> None:
        if not self._places(run.graph):
            everywhere = self._all_places(run.graph)
            found = f"there are {', '.join(everywhere)}" if everywhere else "the model has none; grow=wider works"
            raise UserError(f"grow.where={self.config.where}: no place for a new {self.config.operator}; {found}")
        self.when.check_reach(run)

    def after_epoch(self, run: Run) -> None:
        reason = self.when.due(run)
        if not reason:
            return
        self.when.grown_at.append(run.epoch)
        inputs = run.training_inputs(self.config.calibration_batches)
        with run.precision.autocast(), run.growing(self.config.new_lr_factor, self.config.new_lr_epochs):
            inserted = self._insert(run.graph, self._allowed(run, inputs), inputs, run.optimizer)
        if inserted:
            run.shape_changed(f"inserted {self.config.operator}s {', '.join(inserted)} ({reason})")
            run.rewarm(self.config.rewarm_epochs)

    def state_dict(self) -> dict[str, Any]:
        return {"grown_at": self.when.grown_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.when.grown_at = list(state["grown_at"])

    def _insert(
        self, graph: ChannelGraph, paths: list[str], inputs: list[Any], optimizer: Optimizer | None
    ) -> list[str]:
        if not paths:
            return []
        if self.config.operator == "layer":
            return graph.insert_layer(paths, inputs, kernel=self.config.kernel, optimizer=optimizer)
        start: Any = self.config.start
        return [insert_block_like(graph, path, inputs, start, optimizer) for path in paths]

    def _allowed(self, run: Run, inputs: list[Any]) -> list[str]:
        """The places that the limits leave room for, filled one after the other on a copy."""
        places = self._places(run.graph)
        if self.config.max_params is None and self.config.max_macs is None:
            return places
        room, present = [], copy.deepcopy(run.graph)
        for path in places:
            trial = copy.deepcopy(present)
            self._insert(trial, [path], [inputs[0][:2]], None)
            if share_of_limits(run, trial, self.config.max_params, self.config.max_macs)({}) <= 1:
                room.append(path)
                present = trial
            else:
                log.info("grow=deeper: nothing inserted at %s: grow.max_params or grow.max_macs forbids it", path)
        return room

    def _all_places(self, graph: ChannelGraph) -> list[str]:
        return layer_places(graph) if self.config.operator == "layer" else [end.path for end in graph.stage_ends]

    def _places(self, graph: ChannelGraph) -> list[str]:
        return [path for path in self._all_places(graph) if matches(path, self.config.where)]


def build(config: schema.grow.Deeper) -> Deeper:
    return Deeper(config)
