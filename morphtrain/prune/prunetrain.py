"""PruneTrain (Lym et al. 2019, arXiv 1901.09290): train under a group lasso, drop dead channels every few epochs."""

from __future__ import annotations

from functools import partial
from typing import Any

from morphtrain import schema
from morphtrain.cost import WidthCost
from morphtrain.cost.latency import Terms
from morphtrain.cost.layer_steps import LADDER
from morphtrain.cost.params import count_weights
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.morph import ChannelGraph
from morphtrain.prune.lasso import (
    add_gradient,
    amount_of_step,
    group_lassos,
    pace_of_step,
    penalty,
    share_taken,
    shrink,
    total_norm,
    total_weight,
)
from morphtrain.prune.outlook import Outlook
from morphtrain.prune.reconfigure import Reconfiguration, live_channels, reconfigure
from morphtrain.prune.rounding import Rounding
from morphtrain.prune.step_length import steps_ahead, warn_if_unknown
from morphtrain.prune.strength import enough_for, first_penalty_weight, share_of_loss
from morphtrain.prune.when import check_reach, is_active, is_due
from morphtrain.state import Run


class PruneTrain(Method):
    """The method as hooks of the training loop; `lasso.py` and `reconfigure.py` hold its functional form.

    The weight of its penalty, lambda, is fixed with the first batch: by the run's plan, or by the batch's loss.
    """

    follows_channels = True

    def __init__(self, config: schema.prune.PruneTrain) -> None:
        self.config = config
        self.ignore = config.ignore
        self.outlook = Outlook(config, f"prune.lasso_ratio={config.lasso_ratio:g}")
        self.latency: Terms = {}  # measured so far, if widths are rounded by it

    def before_training(self, run: Run) -> None:
        check_reach(self.config, run)
        if self.config.round_to == "auto":
            self._seconds(run, run.graph)  # measured before the first epoch
        self._find_groups(run)
        if not self.lassos:
            raise UserError("prune=prunetrain: no channels of the model are made or used by trained weights")

    def after_backward(self, run: Run) -> None:
        if self.penalty_weight is None:
            lassos = self.lassos
            value, norms, weights = penalty(lassos).item(), total_norm(lassos), total_weight(lassos)
            self.penalty_weight = first_penalty_weight(self.config, run, value, norms, weights)
        if self.config.update == "subgradient" and is_active(self.config, run.epoch):
            add_gradient(self.lassos, self.penalty_weight * run.step_weight)

    def after_step(self, run: Run) -> None:
        if self.config.update == "proximal" and is_active(self.config, run.epoch):
            assert self.penalty_weight is not None
            strength = self.penalty_weight * run.step_weight
            for lasso in self.lassos:
                amount, pace = amount_of_step(lasso, run.optimizer, strength), pace_of_step(lasso, run.optimizer)
                shrink([lasso], amount, pace)

    def after_epoch(self, run: Run) -> dict[str, float]:
        assert self.penalty_weight is not None
        if not is_active(self.config, run.epoch):
            return {"lasso_ratio": 0.0}
        value = self.penalty_weight * penalty(self.lassos).item()
        if run.epoch == 1:
            warn_if_unknown(run.optimizer)
        change = self._reconfigure(run) if is_due(self.config, run.epoch) else None
        self.outlook.after_epoch(run, bool(change), lambda last: self._reach(run, last))
        if change:
            run.shape_changed(change.summary())
        return {"lasso_ratio": share_of_loss(value, run.train_loss)}

    def after_change(self, run: Run) -> None:
        self._find_groups(run)

    def measure(self, run: Run) -> dict[str, float]:
        live, threshold = live_channels(run.graph, self.config.threshold), self.config.threshold
        return {
            "channel_density": live / run.initial["channels"] if run.graph.spaces else 1.0,
            "weight_density": count_weights(run.model, threshold) / run.initial["weights"],
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "strength": self.penalty_weight,
            "latency": self.latency,
            "removed": self.outlook.removed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.penalty_weight = state["strength"]
        self.latency = state.get("latency", {})  # older checkpoints have none of these
        self.outlook.removed = state.get("removed", True)

    def _reach(self, run: Run, last: int) -> tuple[float, str]:
        """See `Outlook.after_epoch`."""
        assert self.penalty_weight is not None
        amounts = [amount_of_step(lasso, run.optimizer, self.penalty_weight) for lasso in self.lassos]
        share = max(share_taken(lasso, amount) for lasso, amount in zip(self.lassos, amounts, strict=True))
        share *= steps_ahead(run, last)
        return share, enough_for(self.config, share)

    def _reconfigure(self, run: Run) -> Reconfiguration:
        return reconfigure(
            run.graph,
            threshold=self.config.threshold,
            rounding=self._rounding(run),
            residual="gating" if self.config.residual == "gating" else "union",
            optimizer=run.optimizer,
        )

    def _rounding(self, run: Run) -> Rounding:
        least = self.config.min_channels
        if self.config.round_to != "auto":
            return Rounding(least, self.config.round_to)
        return Rounding(least, LADDER, partial(self._seconds, run), self.config.round_down)

    def _seconds(self, run: Run, graph: ChannelGraph) -> WidthCost:
        return run.width_cost("latency", self.latency, graph)

    def _find_groups(self, run: Run) -> None:
        self.lassos = group_lassos(run.graph, sqrt_size=self.config.group_weight == "sqrt_size")


def build(config: schema.prune.PruneTrain) -> PruneTrain:
    return PruneTrain(config)
