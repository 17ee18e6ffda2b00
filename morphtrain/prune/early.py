"""Prune early to a target, then train the small network: no ratio to guess, and no pull after the last cut.

The target is approached in a few cuts, each after an epoch. For half of the epochs from one cut to the next the network
trains as it would without. Then the channels are chosen that matter least for what they cost, and only these fade out
until the cut. Early-Bird tickets (You et al. 2020, arXiv 1909.11957) show that it can be so early; HESSO (Chen et al.
2024, arXiv 2409.09085) prunes to a target instead of by a penalty.
"""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import torch

from morphtrain import schema
from morphtrain.cost import CostKind, WidthCost
from morphtrain.cost.latency import Terms, known_terms
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.morph import Space
from morphtrain.prune.early_bird import EarlyBird
from morphtrain.prune.fading import NOTHING, Fading, resumed
from morphtrain.prune.importance import Importance, Taylor, gamma, magnitude, rising
from morphtrain.prune.knapsack import OutOfReach, within
from morphtrain.state import Run
from morphtrain.wording import counted
from morphtrain.world import agree

log = logging.getLogger(__name__)

FADING = 0.5  # of the epochs between two cuts; in those before, the weights show what they are good for
# Why a measure of importance may know nothing of a channel.
UNKNOWN = {
    "gamma": "no channels of the model go through a norm with a scale",
    "taylor": "no channels of the model are read by trained layers alone",
}


class Early(Method):
    """The method as hooks of the training loop; `importance`, `knapsack.within` and `Fading` are its functional form.

    Attributes:
        cuts: the epochs that a cut follows.
        first_cost: of the run's first network.
        fading: the channels that go with the next cut, once they are chosen.
    """

    follows_channels = True

    def __init__(self, config: schema.prune.Early) -> None:
        self.config = config
        self.ignore = config.ignore
        self.cuts: list[int] = []
        self.first_cost = 0.0
        self.latency: Terms = {}  # measured so far, if that is the cost
        self.taylor = Taylor()
        self.bird = None if config.stable is None else EarlyBird(config.stable)
        self.hastened: int | None = None  # the epoch that the cut follows, since the choice has settled
        self.fading: Fading | None = None
        self.cut: int | None = None  # the epoch that the next cut follows; None after the last one
        self.cut_at = self.fades_for = 0.0  # the run's progress when it comes; how many epochs before it channels fade
        self._stored: dict[str, Any] | None = None  # what a checkpoint holds of `fading`

    def before_training(self, run: Run) -> None:
        self.cuts = self.config.cut_epochs(run.config.epochs) if self.hastened is None else [self.hastened]
        if run.epoch == 0:
            self._check_spaces(run)
            self.first_cost = self._cost(run)()
            self._chosen(run, self.config.target)  # to say at once if it cannot be done
        self.taylor.to(run.device)
        self.fading = resumed(run.graph, self._stored) if self._stored is not None else None

    def before_epoch(self, run: Run) -> None:
        self.cut = min((epoch for epoch in self.cuts if epoch >= run.epoch), default=None)
        if self.cut is not None:
            before = max((epoch for epoch in self.cuts if epoch < self.cut), default=0)
            self.cut_at = run.progress + self.cut - (run.epoch - 1)
            self.fades_for = FADING * (self.cut - before)

    def after_backward(self, run: Run) -> None:
        if self.config.importance == "taylor" and self.cut is not None and self.fading is None:
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
            self._hasten(run)
            return
        if self.fading is None:  # the steps after which to choose were skipped
            self._choose(run, 0.0)
        assert self.fading is not None
        change = self.fading.cut(run.optimizer)
        self.fading = None
        if change:
            run.shape_changed(change.summary())

    def after_change(self, run: Run) -> None:
        self.fading, self.taylor = None, Taylor()  # what was chosen or seen may have been of other channels
        if self.bird is not None:
            self.bird.masks = []

    def measure(self, run: Run) -> dict[str, float]:
        return {"cost_share": self._cost(run)() / self.first_cost}

    def state_dict(self) -> dict[str, Any]:
        return {
            "first_cost": self.first_cost,
            "latency": self.latency,
            "taylor": self.taylor.state_dict(),
            "fading": self.fading.state_dict() if self.fading is not None else None,
            "choices": self.bird.masks if self.bird is not None else [],
            "hastened": self.hastened,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_cost = state["first_cost"]
        self.latency = known_terms(state, "prune.cost")
        self.taylor.load_state_dict(state["taylor"])
        self._stored = state["fading"]
        self.hastened = state.get("hastened")  # older checkpoints have neither
        if self.bird is not None:
            self.bird.masks = list(state.get("choices", []))

    def _hasten(self, run: Run) -> None:
        """Let the cut follow the next epoch if the choice of channels has settled."""
        if self.bird is None or self.cut is None or self.fading is not None or self.cut <= run.epoch + 1:
            return
        gone = self._chosen(run, self.config.target)
        if self.bird.settled(torch.cat([gone[space] for space in run.graph.spaces])):
            self.hastened = run.epoch + 1
            self.cuts = [self.hastened]
            log.info(
                "prune=early: over %d epochs the choice of channels has changed in less than %.3g of them; the cut "
                "follows epoch %d instead of %d",
                *(len(self.bird.masks), self.config.stable, self.hastened, self.cut),
            )

    def _choose(self, run: Run, left: float) -> None:
        """Choose what the next cut removes: so much that the network is as far on its way to the target as the run."""
        assert self.cut is not None
        share = self.config.target ** (self.cut / self.cuts[-1])
        gone = self._chosen(run, share)
        self.fading, self.taylor = Fading(run.graph, gone, left), Taylor()
        log.info(
            "prune=early: %s of %d fade out until the end of epoch %d; then %s are at most %.3g of the first network's",
            counted(sum(int(mask.sum()) for mask in gone.values()), "channel"),
            *(sum(space.size for space in run.graph.spaces), self.cut, self.config.cost, share),
        )

    def _chosen(self, run: Run, share: float) -> dict[Space, torch.Tensor]:
        """Masks (size,) of the channels without which the network costs at most this share of the first one.

        Raises:
            UserError: if no widths that are allowed cost so little; if training has diverged.
        """
        lost = {space: rising(found) for space, found in self._importance(run).items()}
        cost, budget = self._cost(run), share * self.first_cost
        multiple, least = self.config.round_to, self.config.min_channels
        try:
            keep = within(run.graph, lost, cost, budget, multiple=multiple, min_channels=least)
        except OutOfReach as error:
            raise UserError(self._unreachable(error.least / self.first_cost)) from error
        except ValueError as error:
            raise UserError(
                f"prune=early: {error}: training has diverged; an optimizer.lr below {run.base_lrs[0]:g} may work"
            ) from error
        masks = agree([keep[space] for space in run.graph.spaces])
        return {space: ~mask for space, mask in zip(run.graph.spaces, masks, strict=True)}

    def _unreachable(self, least: float) -> str:
        """What to say where the network costs at least this share of what the first one did."""
        multiple, channels = self.config.round_to, self.config.min_channels
        reached = math.ceil(1000 * least) / 1000
        other = f"{reached:g} can" if reached < 1 else "no target can"
        wanted = f"{other}, and smaller values of these may allow less"
        return (
            f"prune.target={self.config.target:g}: cannot be reached with prune.round_to={multiple} and "
            f"prune.min_channels={channels}; {wanted}"
        )

    def _importance(self, run: Run) -> Importance:
        if self.config.importance == "taylor":
            return self.taylor.importance(run.graph)
        return gamma(run.graph) if self.config.importance == "gamma" else magnitude(run.graph)

    def _cost(self, run: Run) -> WidthCost:
        """The cost of the present network by its widths."""
        return run.width_cost(cast(CostKind, self.config.cost), self.latency)

    def _check_spaces(self, run: Run) -> None:
        """Raise a `UserError` if no channel can go, and say which ones stay because nothing is known of them."""
        importance, measure = self._importance(run), self.config.importance
        kept = [space.name for space, found in importance.items() if not found.isfinite().any()]
        if len(kept) == len(importance):
            why = UNKNOWN.get(measure) if kept else None
            raise UserError(
                f"prune.importance={measure}: {why}; prune.importance=magnitude needs none of that"
                if why
                else "prune=early: the model has no channels that can go"
            )
        if kept:
            log.info("prune.importance=%s: left as wide as they are: %s", measure, ", ".join(kept))


def build(config: schema.prune.Early) -> Early:
    return Early(config)
