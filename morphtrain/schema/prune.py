"""Options of the group `prune`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from morphtrain.schema.checks import COSTS, check, check_one_of, check_share
from morphtrain.schema.option import Option
from morphtrain.schema.shares import ended


@dataclass
class Prune(Option, group="prune", plain=("none",)):
    """Base of the pruning methods."""


@dataclass
class PruneTrain(Prune, option="prunetrain"):
    """PruneTrain: group lasso and periodic reconfiguration."""

    metrics = ("lasso_ratio",)
    epoch_keys = ("interval", "start_epoch", "stop_epoch")

    lasso_ratio: float
    lasso_ratio_of: str
    group_weight: str
    update: str
    threshold: float
    interval: int
    start_epoch: int
    stop_epoch: int | None
    round_to: Any  # int, or "auto"
    round_down: float
    min_channels: int
    residual: str
    ignore: list[str]

    def __post_init__(self) -> None:
        _check_ratio(self)
        check_one_of("prune.group_weight", self.group_weight, ("none", "sqrt_size"))
        check_one_of("prune.update", self.update, ("proximal", "subgradient"))
        check(self.threshold > 0, "prune.threshold", self.threshold, "above 0 (the thesis: 1e-5 to 1e-1)")
        _check_common(self)
        whole = type(self.round_to) is int and self.round_to >= 1
        check(whole or self.round_to == "auto", "prune.round_to", self.round_to, "1 or more channels, or auto")
        check_share("prune.round_down", self.round_down, zero=True)
        wanted = f"0 with prune.round_to={self.round_to}; prune.round_to=auto allows it"
        check(self.round_to == "auto" or not self.round_down, "prune.round_down", self.round_down, wanted)
        check_one_of("prune.residual", self.residual, ("union", "gating"))


@dataclass
class MorphNetPenalty(Prune, option="morphnet"):
    """MorphNet's shrinking: a penalty on the cost of the network."""

    metrics = ("lasso_ratio",)
    epoch_keys = ("interval", "start_epoch", "stop_epoch")

    cost: str
    regulariser: str
    lasso_ratio: float | None
    lasso_ratio_of: str
    strength: float | None
    gamma_threshold: float
    interval: int
    start_epoch: int
    stop_epoch: int | None
    round_to: int
    min_channels: int
    ignore: list[str]

    def __post_init__(self) -> None:
        check_one_of("prune.cost", self.cost, COSTS)
        check_one_of("prune.regulariser", self.regulariser, ("gamma_l1", "group_lasso"))
        ratio, strength = self.lasso_ratio, self.strength
        if strength is None:
            _check_ratio(self, " (or null, with prune.strength given)")
        else:
            check(strength > 0, "prune.strength", strength, "above 0, or null")
            check(ratio is None, "prune.lasso_ratio", ratio, f"null when prune.strength={strength} is given")
        check(self.gamma_threshold > 0, "prune.gamma_threshold", self.gamma_threshold, "above 0 (usual: 1e-3 to 1e-2)")
        _check_common(self)
        check(self.round_to >= 1, "prune.round_to", self.round_to, "1 or more channels")


@dataclass
class Early(Prune, option="early"):
    """Early pruning: a few cuts to a target in the first epochs, and training without a pull from then on."""

    metrics = ("cost_share",)

    target: float
    cost: str
    by: float
    cuts: int
    stable: float | None
    importance: str
    round_to: int
    min_channels: int
    ignore: list[str]

    def __post_init__(self) -> None:
        check_share("prune.target", self.target, "the first network's cost")
        check_one_of("prune.cost", self.cost, COSTS)
        check_share("prune.by", self.by, "the epochs")
        check(self.cuts >= 1, "prune.cuts", self.cuts, "1 or more")
        if self.stable is not None:
            check_share("prune.stable", self.stable, "the channels")
            alone = self.cuts == 1  # a cut makes other channels, and no choice could settle
            check(alone, "prune.cuts", self.cuts, f"1 with prune.stable={self.stable:g}; or prune.stable=null")
        check_one_of("prune.importance", self.importance, ("magnitude", "gamma", "taylor"))
        check(self.round_to >= 1, "prune.round_to", self.round_to, "1 or more channels")
        check(self.min_channels >= 1, "prune.min_channels", self.min_channels, "1 or more channels")

    def cut_epochs(self, epochs: int) -> list[int]:
        """The epochs that cuts follow in a run of so many, as far apart as whole epochs can be; one at least.

        Raises:
            UserError: if no epoch would train the small network.
        """
        check(epochs >= 2, "epochs", epochs, "2 or more with prune=early, which leaves some to train the small network")
        last = max(1, min(ended(self.by, epochs), epochs - 1))
        cuts = min(self.cuts, last)
        return [math.ceil(last * cut / cuts) for cut in range(1, cuts + 1)]


def _check_ratio(option: PruneTrain | MorphNetPenalty, otherwise: str = "") -> None:
    of, ratio = option.lasso_ratio_of, option.lasso_ratio
    check_one_of("prune.lasso_ratio_of", of, ("initial_norm", "loss"))
    limit, wanted = (1.0, "above 0 and below 1") if of == "loss" else (math.inf, "above 0 (usual: 2 to 16)")
    right = ratio is not None and 0 < ratio < limit
    check(right, "prune.lasso_ratio", ratio, f"{wanted}, with prune.lasso_ratio_of={of}{otherwise}")


def _check_common(option: PruneTrain | MorphNetPenalty) -> None:
    """Check the keys that all pruning methods share: when they act, and how much they leave."""
    check(option.interval >= 1, "prune.interval", option.interval, "1 or more epochs")
    check(option.start_epoch >= 1, "prune.start_epoch", option.start_epoch, "1 or more (the first epoch is 1)")
    check(
        option.stop_epoch is None or option.stop_epoch >= option.start_epoch,
        "prune.stop_epoch",
        option.stop_epoch,
        f"prune.start_epoch={option.start_epoch} or later, or null",
    )
    check(option.min_channels >= 1, "prune.min_channels", option.min_channels, "1 or more channels")
