"""PruneTrain (Lym et al. 2019, arXiv 1901.09290): train under a group lasso, drop dead channels every few epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from morphtrain import schema
from morphtrain.prune.lasso import add_gradient, group_lassos, penalty, penalty_weight_for_ratio, shrink
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.prune.rounding import Rounding
from morphtrain.prune.schedule import check_reach, is_active, is_due
from morphtrain.prune.step_length import step_length
from morphtrain.prune.widths import WidthProbe

if TYPE_CHECKING:
    from morphtrain.trainer.run import Run


PROBE_SHARE = 0.05  # of the training so far: as long as the probe has taken more, widths are not rounded


class PruneTrain:
    """The method as hooks of the training loop; `lasso.py` and `reconfigure.py` hold its functional form."""

    def __init__(self, config: schema.PruneTrain) -> None:
        self.config = config
        self.strength: float | None = None  # lambda; fixed by the first batch
        self.probe_seconds = 0.0  # that looking for the fastest widths has taken

    def before_training(self, run: Run) -> None:
        check_reach(self.config, run)
        self._find_groups(run)

    def after_backward(self, run: Run) -> None:
        if self.strength is None:
            gl = penalty(self.lassos).item()
            self.strength = penalty_weight_for_ratio(self.config.lasso_ratio, run.loss.item(), gl)
        if self.config.update == "subgradient" and is_active(self.config, run.epoch):
            add_gradient(self.lassos, self.strength)

    def after_step(self, run: Run) -> None:
        if self.config.update == "proximal" and is_active(self.config, run.epoch):
            assert self.strength is not None
            for lasso in self.lassos:
                shrink([lasso], step_length(run.optimizer, lasso.weight) * self.strength)

    def after_epoch(self, run: Run) -> dict[str, float]:
        assert self.strength is not None
        if not is_active(self.config, run.epoch):
            return {"lasso_ratio": 0.0}
        gl = self.strength * penalty(self.lassos).item()
        if is_due(self.config, run.epoch):
            rounding = self._rounding(run)
            change = reconfigure(
                run.graph,
                threshold=self.config.threshold,
                rounding=rounding,
                residual="gating" if self.config.residual == "gating" else "union",
                optimizer=run.optimizer,
            )
            if rounding.probe is not None:
                self.probe_seconds += rounding.probe.spent_seconds
            if change:
                run.shape_changed(change.summary())
        return {"lasso_ratio": gl / (run.train_loss + gl)}

    def after_change(self, run: Run) -> None:
        self._find_groups(run)

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.strength, "probe_seconds": self.probe_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strength = state["strength"]
        self.probe_seconds = state.get("probe_seconds", 0.0)  # older checkpoints have none

    def _rounding(self, run: Run) -> Rounding:
        least = self.config.min_channels
        if self.config.round_to != "auto":
            return Rounding(least, self.config.round_to)
        trained = run.history[-1]["train_seconds"] if run.history else 0.0
        if self.probe_seconds > PROBE_SHARE * trained:
            return Rounding(least)
        probe = WidthProbe(run.micro_batch or run.batch_size, run.precision.autocast)
        return Rounding(least, probe=probe, round_down=self.config.round_down)

    def _find_groups(self, run: Run) -> None:
        self.lassos = group_lassos(run.graph, sqrt_size=self.config.group_weight == "sqrt_size")


def build(config: schema.PruneTrain) -> PruneTrain:
    return PruneTrain(config)
