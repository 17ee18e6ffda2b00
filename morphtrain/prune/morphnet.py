"""MorphNet's shrinking (Gordon et al. 2018, arXiv 1711.06798): a penalty on what channels cost, dead ones removed."""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch

from morphtrain import schema
from morphtrain.cost import CostKind
from morphtrain.cost.latency import Terms, known_terms
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.morph import ChannelGraph, Space
from morphtrain.prune.bias_folding import fold_constants
from morphtrain.prune.channel_norms import ChannelNorms, Regulariser
from morphtrain.prune.outlook import Outlook
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.prune.rounding import Rounding
from morphtrain.prune.step_length import steps_ahead, warn_if_unknown
from morphtrain.prune.strength import enough_for, first_penalty_weight, share_of_loss
from morphtrain.prune.when import check_reach, is_active, is_due
from morphtrain.state import Run

log = logging.getLogger(__name__)


class MorphNetPenalty(Method):
    """The method as hooks of the training loop; `WidthCost`, `ChannelNorms` and `reconfigure` are its functional form.

    The slopes are what a channel of each space costs at the present live widths. They are computed once an epoch, with
    its first batch: widths change little within an epoch, and no step has to wait for the device.
    """

    follows_channels = True

    def __init__(self, config: schema.prune.MorphNetPenalty) -> None:
        self.config = config
        self.cost, self.regulariser = cast(CostKind, config.cost), cast(Regulariser, config.regulariser)
        self.ignore = config.ignore
        self.penalty_weight = config.strength  # loss per unit of cost; without one fixed by the first batch
        key, value = ("lasso_ratio", config.lasso_ratio) if config.strength is None else ("strength", config.strength)
        self.outlook = Outlook(config, f"prune.{key}={value:g}")
        self.latency: Terms = {}  # measured so far, if that is the cost
        self.priced = 0  # the epoch that `norms` and `slopes` are of

    def before_training(self, run: Run) -> None:
        check_reach(self.config, run)
        self._check_spaces(run.graph)
        run.width_cost(self.cost, self.latency)  # measures before the first epoch

    def after_backward(self, run: Run) -> None:
        if not is_active(self.config, run.epoch):
            return
        if self.priced != run.epoch:
            self._price(run)
        if self.penalty_weight is None:
            norms, slopes = self.norms.penalty(torch.ones_like(self.slopes)).item(), self.slopes.sum().item()
            penalty = self.norms.penalty(self.slopes).item()
            self.penalty_weight = first_penalty_weight(self.config, run, penalty, norms, slopes)

    def after_step(self, run: Run) -> None:
        if is_active(self.config, run.epoch):
            assert self.penalty_weight is not None
            amounts = self.penalty_weight * run.step_weight * self.slopes
            self.norms.shrink(amounts, self.norms.step_lengths(run.optimizer))

    def after_epoch(self, run: Run) -> dict[str, float]:
        if not is_active(self.config, run.epoch):
            return {"lasso_ratio": 0.0}
        assert self.penalty_weight is not None
        self._price(run)
        value = self.penalty_weight * self.norms.penalty(self.slopes).item()
        if run.epoch == 1:
            warn_if_unknown(run.optimizer)
        removed = is_due(self.config, run.epoch) and self._reconfigure(run)
        self.outlook.after_epoch(run, removed, lambda last: self._reach(run, last))
        return {"lasso_ratio": share_of_loss(value, run.train_loss)}

    def measure(self, run: Run) -> dict[str, float]:
        return {"channel_density": self._live_channels(run.graph) / run.initial["channels"]}

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.penalty_weight, "latency": self.latency, "removed": self.outlook.removed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.penalty_weight = state["strength"]
        self.latency = known_terms(state, "prune.cost")
        self.outlook.removed = state.get("removed", True)  # older checkpoints do not say

    def _reach(self, run: Run, last: int) -> tuple[float, str]:
        """See `Outlook.after_epoch`."""
        assert self.penalty_weight is not None
        lengths = steps_ahead(run, last) / self.norms.per_length(run.optimizer)
        ahead = self.penalty_weight * lengths * self.slopes / self.norms.mean_members()
        share = ahead.max().item()
        if self.config.strength is not None and share:
            return share, f"prune.strength={self.config.strength / share:.2g}"
        return share, enough_for(self.config, share)

    def _price(self, run: Run) -> None:
        """Find the channels of the present network, and what each of them costs."""
        cost = run.width_cost(self.cost, self.latency)
        self.norms = ChannelNorms(run.graph, self.regulariser)
        self.slopes = self.norms.per_channel(cost.coefficients(self.norms.alive(self.config.gamma_threshold)))
        self.priced = run.epoch

    def _reconfigure(self, run: Run) -> bool:
        """Remove what is dead; whether there was anything."""
        dead = {space: r < self.config.gamma_threshold for space, r in self.norms.importance().items()}
        dead = {space: mask for space, mask in dead.items() if mask.any()}
        if not dead:
            return False
        images, _ = next(run.all_batches())
        run.settle()  # the constants are those of the evaluated network
        fold_constants(run.graph, images, dead)
        if run.averages.values:
            run.settle_averages()
            with run.averaged():
                fold_constants(run.graph, images, dead)
        self.norms.clear(dead)
        change = reconfigure(
            run.graph,
            threshold=self.config.gamma_threshold,
            rounding=Rounding(self.config.min_channels, self.config.round_to),
            optimizer=run.optimizer,
            importance_of=functools.partial(importance_of_all, regulariser=self.regulariser),
        )
        if change:
            run.shape_changed(change.summary())
        return bool(change)

    def _live_channels(self, graph: ChannelGraph) -> int:
        importance = importance_of_all(graph, self.regulariser)
        return sum(int((r >= self.config.gamma_threshold).sum()) for r in importance.values())

    def _check_spaces(self, graph: ChannelGraph) -> None:
        spaces = ChannelNorms(graph, self.regulariser).spaces
        alone = [space.name for space in graph.spaces if space not in spaces]
        if not spaces and self.regulariser == "gamma_l1":
            raise UserError(
                "prune.regulariser=gamma_l1: no channels of the model go through trained norms before they are used; "
                "prune.regulariser=group_lasso needs none"
            )
        if not spaces:
            raise UserError("prune.regulariser=group_lasso: the model has no channels made by trained weights alone")
        if alone:
            log.info("prune.regulariser=%s: left as wide as they are: %s", self.regulariser, ", ".join(alone))


def importance_of_all(graph: ChannelGraph, regulariser: Regulariser) -> dict[Space, torch.Tensor]:
    """r of every channel of every space, (size,) on the CPU; infinite where nothing is regularised: these stay."""
    importance = {space: torch.full((space.size,), torch.inf) for space in graph.spaces}
    found = ChannelNorms(graph, regulariser).importance()
    return importance | {space: r.float().cpu() for space, r in found.items()}


def build(config: schema.prune.MorphNetPenalty) -> MorphNetPenalty:
    return MorphNetPenalty(config)
