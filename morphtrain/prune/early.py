"""Prune early to a target, then train the small network: no penalty, no ratio to guess, and no pull after the last cut.

The target is approached in a few cuts, each after an epoch. Until half of the epochs from one cut to the next are over,
the network trains as it would without. Then the channels are chosen that matter least for what they cost, and only these
fade out until the cut (`fading.py`). Others do that with a penalty (PruneTrain), or with masks that are found first and
applied to a new start (Early-Bird, You et al. 2020, arXiv 1909.11957). Pruning against a target instead of by a penalty
is HESSO's (Chen et al. 2024, arXiv 2409.09085).
"""

from __future__ import annotations

import logging
from typing import Any, cast

from morphtrain import schema
from morphtrain.cost import CostKind, Roofline, WidthCost, measure_roofline
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.morph import Space
from morphtrain.prune.fading import NOTHING, Fading, resumed
from morphtrain.prune.importance import Importance, Taylor, gamma, magnitude, rising
from morphtrain.prune.knapsack import within
from morphtrain.state import Run
from morphtrain.wording import counted
from morphtrain.world import agree

log = logging.getLogger(__name__)

FADING = 0.5  # of the epochs between two cuts; in those before, the weights show what they are good for


class Early(Method):
    """The method as hooks of the training loop; `importance`, `knapsack.within` and `Fading` are its functional form.

    Attributes:
        first_cost: of the run's first network.
        fading: the channels that go with the next cut, once they are chosen.
    """

    follows_channels = True

    def __init__(self, config: schema.prune.Early) -> None:
        self.config = config
        self.ignore = config.ignore
        self.first_cost = 0.0
        self.roofline: Roofline | None = None
        self.taylor = Taylor()
        self.fading: Fading | None = None
        self.cut: int | None = None  # the epoch that the next cut follows
        self.cut_at = self.fades_for = 0.0  # the progress at which it comes; epochs before it in which channels fade
        self._faded: dict[str, Any] | None = None  # of a checkpoint

    def before_training(self, run: Run) -> None:
        self.cuts = self.config.cut_epochs(run.config.epochs)
        if self.config.cost == "latency" and self.roofline is None:
            self.roofline = agree(measure_roofline(run.device))
        if run.epoch == 0:
            self._check_spaces(run)
            self.first_cost = self._cost(run)()
            self._chosen(run, self.config.target)  # is an error now if it cannot be done
        self.taylor.to(run.device)
        self.fading = resumed(run.graph, self._faded) if self._faded is not None else None

    def before_epoch(self, run: Run) -> None:
        ahead = [epoch for epoch in self.cuts if epoch >= run.epoch]
        self.cut = ahead[0] if ahead else None
        if self.cut is not None:
            before = max((epoch for epoch in self.cuts if epoch < self.cut), default=0)
            self.cut_at = run.progress + self.cut - (run.epoch - 1)
            self.fades_for = FADING * (self.cut - before)

    def after_backward(self, run: Run) -> None:
        if self._is_watching() and self.config.importance == "taylor":
            self.taylor.look(run.graph)

    def after_step(self, run: Run) -> None:
        if self.cut is None:
            return
        left = self.cut_at - run.progress
        if self.fading is not None:
            self.fading.fade(left)
            return
        self.taylor.count()
        if left <= self.fades_for + NOTHING:
            self._choose(run, left)

    def after_epoch(self, run: Run) -> None:
        if run.epoch != self.cut:
            return
        if self.fading is None:  # no step was left for it, or the last ones were skipped
            self._choose(run, 0.0)
        assert self.fading is not None
        change = self.fading.cut(run.optimizer)
        self._start_anew()
        if change:
            run.shape_changed(change.summary())

    def after_change(self, run: Run) -> None:
        self._start_anew()  # others may have changed what was chosen

    def measure(self, run: Run) -> dict[str, float]:
        return {"cost_share": self._cost(run)() / self.first_cost}

    def state_dict(self) -> dict[str, Any]:
        return {
            "first_cost": self.first_cost,
            "roofline": list(self.roofline) if self.roofline else None,
            "taylor": self.taylor.state_dict(),
            "fading": self.fading.state_dict() if self.fading is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_cost = state["first_cost"]
        self.roofline = Roofline(*state["roofline"]) if state["roofline"] else None
        self.taylor.load_state_dict(state["taylor"])
        self._faded = state["fading"]

    def _is_watching(self) -> bool:
        """Whether the next cut is still to be chosen."""
        return self.cut is not None and self.fading is None

    def _start_anew(self) -> None:
        self.fading, self.taylor = None, Taylor()

    def _choose(self, run: Run, left: float) -> None:
        """Choose what the next cut removes: what brings the network as far as it has to be by then."""
        assert self.cut is not None
        share = self.config.target ** (self.cut / self.cuts[-1])
        gone = self._chosen(run, share)
        self.fading = Fading(run.graph, gone, left)
        log.info(
            "prune=early: %s of %d fade out until the end of epoch %d, for %.3g of the first network's %s",
            counted(sum(int(mask.sum()) for mask in gone.values()), "channel"),
            *(sum(space.size for space in run.graph.spaces), self.cut, share, self.config.cost),
        )

    def _chosen(self, run: Run, share: float) -> dict[Space, Any]:
        """Masks (size,) of the channels without which the network costs at most this share of the first one.

        Raises:
            UserError: if no widths that are allowed cost so little.
        """
        lost = {space: rising(found) for space, found in self._importance(run).items()}
        budget, config = share * self.first_cost, self.config
        try:
            keep = within(
                run.graph, lost, self._cost(run), budget, multiple=config.round_to, min_channels=config.min_channels
            )
        except ValueError as error:
            least = f"prune.round_to={config.round_to} and prune.min_channels={config.min_channels}"
            raise UserError(
                f"prune.target={config.target:g}: cannot be reached with {least}; a larger target, or smaller ones of "
                f"these, may work ({error})"
            ) from error
        masks = agree([keep[space] for space in run.graph.spaces])
        return {space: ~mask for space, mask in zip(run.graph.spaces, masks, strict=True)}

    def _importance(self, run: Run) -> Importance:
        if self.config.importance == "taylor":
            return self.taylor.importance(run.graph)
        return magnitude(run.graph) if self.config.importance == "magnitude" else gamma(run.graph)

    def _cost(self, run: Run) -> WidthCost:
        """What the present network costs, by its widths, at the batch size that the run starts with."""
        kind = cast(CostKind, self.config.cost)
        return WidthCost(run.graph, kind, batch_size=run.config.first_batch_size, roofline=self.roofline)

    def _check_spaces(self, run: Run) -> None:
        """Raise a `UserError` if no channel can go, and say which ones the measure of importance leaves out."""
        importance, measure = self._importance(run), self.config.importance
        kept = [space.name for space, found in importance.items() if not found.isfinite().any()]
        if len(kept) == len(importance):
            raise UserError(
                f"prune.importance={measure}: it says nothing about any channels of the model"
                + ("" if measure == "magnitude" else "; prune.importance=magnitude needs neither norms nor gradients")
            )
        if kept:
            log.info("prune.importance=%s: left as wide as they are: %s", measure, ", ".join(kept))


def build(config: schema.prune.Early) -> Early:
    return Early(config)
