"""PruneTrain as MorphNet: grow only where the regulariser did not shrink."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from morphtrain import schema
from morphtrain.cost import measure_roofline
from morphtrain.grow.expand import Cost
from morphtrain.grow.kept import Growth, grow_where_kept, kept_spaces
from morphtrain.grow.limits import cost_of, share_of_limits
from morphtrain.grow.when import When
from morphtrain.morph import ChannelGraph

if TYPE_CHECKING:
    from morphtrain.trainer.run import Run

log = logging.getLogger(__name__)


class Selective:
    """The method as hooks of the training loop; `kept.grow_where_kept` is its functional form."""

    def __init__(self, config: schema.Selective) -> None:
        self.config = config
        self.when = When(config)
        self.target = 0.0  # in the unit of config.cost
        self.reference: dict[str, int] = {}  # widths at the start, and behind the last growth, by space name
        self.roofline: tuple[float, float] | None = None

    def before_training(self, run: Run) -> None:
        if run.epoch > 0:
            return
        if self.config.cost == "latency":
            self.roofline = measure_roofline(run.device)
        self.target = self.config.target * cost_of(run, run.graph, self.config.cost, self.roofline)()
        self.reference = {space.name: space.size for space in run.graph.spaces}

    def after_epoch(self, run: Run) -> None:
        reason = self.when.due(run)
        if not reason:
            return
        self.when.grown_at.append(run.epoch)
        kept = kept_spaces(run.graph, self.reference, self.config.keep_fraction)
        before = cost_of(run, run.graph, self.config.cost, self.roofline)()
        growth = self.grow(run, self.target)
        log.info(
            "grow=%s: %s; %d of %d spaces kept %g of their channels: %s; %s %.4g -> %.4g of %.4g",
            self.config.name,
            reason,
            len(kept),
            len(self.reference),
            self.config.keep_fraction,
            growth.summary() or "nothing grew",
            self.config.cost,
            before,
            cost_of(run, run.graph, self.config.cost, self.roofline)(),
            self.target,
        )
        if growth:
            run.shape_changed(f"{growth.summary()} ({reason})")
            run.rewarm(self.config.rewarm_epochs)

    def grow(self, run: Run, target: float) -> Growth:
        """Grow what kept its channels to `target`, and take the new widths for reference."""
        with run.precision.autocast():
            growth = grow_where_kept(
                run.graph,
                self.reference,
                lambda graph: self._share(run, graph, target),
                1.0,
                keep_fraction=self.config.keep_fraction,
                operator=self.config.operator,  # type: ignore[arg-type]
                start=self.config.start,  # type: ignore[arg-type]
                calibration=run.training_inputs(self.config.calibration_batches),
                noise=self.config.noise,
                generator=run.generator(run.epoch),
                optimizer=run.optimizer,
            )
        self.reference = {space.name: space.size for space in run.graph.spaces}
        return growth

    def limits(self, run: Run, graph: ChannelGraph) -> Cost:
        """The cost as a share of the hard limits."""
        return share_of_limits(run, graph, self.config.max_params, self.config.max_macs)

    def _share(self, run: Run, graph: ChannelGraph, target: float) -> Cost:
        """The cost as a share of the target or of the hard limits, whichever is larger."""
        cost, limits = cost_of(run, graph, self.config.cost, self.roofline), self.limits(run, graph)
        return lambda widths: max(cost(widths) / target, limits(widths))

    def state_dict(self) -> dict[str, Any]:
        return {
            "grown_at": self.when.grown_at,
            "target": self.target,
            "reference": self.reference,
            "roofline": self.roofline,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.when.grown_at = list(state["grown_at"])
        self.target, self.reference, self.roofline = state["target"], state["reference"], state["roofline"]


def build(config: schema.Selective) -> Selective:
    return Selective(config)
