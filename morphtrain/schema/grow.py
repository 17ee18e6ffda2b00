"""Options of the group `grow`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import COSTS, check, check_one_of, check_share
from morphtrain.schema.option import Option


@dataclass
class Grow(Option, group="grow", plain=("none",)):
    """Base of the growth methods."""


@dataclass(kw_only=True)
class Growth(Grow):
    """The keys that all ways to grow while training share.

    An option inherits from the classes below that describe what it does; each class checks its own keys.
    """

    rewarm_epochs: float
    new_lr_factor: float
    new_lr_epochs: float

    def __post_init__(self) -> None:
        check(self.rewarm_epochs >= 0, "grow.rewarm_epochs", self.rewarm_epochs, "0 or more epochs")
        check(self.new_lr_factor >= 0, "grow.new_lr_factor", self.new_lr_factor, "0 or more; 1 is as all else")
        check(self.new_lr_epochs > 0, "grow.new_lr_epochs", self.new_lr_epochs, "above 0 epochs")


@dataclass(kw_only=True)
class Limited(Growth):
    """Growth within hard limits."""

    max_params: float | None
    max_macs: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_params", "max_macs"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"grow.{key}", value, "1 or more times the first network, or null")


@dataclass(kw_only=True)
class Planned(Limited):
    """Growth after given epochs and on plateaus."""

    epoch_keys = ("at_epochs",)

    at_epochs: list[int]
    patience: int | None
    smoothing: float
    max_times: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(all(e >= 1 for e in self.at_epochs), "grow.at_epochs", self.at_epochs, "epochs, counted from 1")
        some = bool(self.at_epochs) or self.patience is not None
        check(some, "grow.at_epochs", self.at_epochs, "at least one epoch, unless grow.patience is a number")
        check(self.patience is None or self.patience >= 1, "grow.patience", self.patience, "1 or more epochs, or null")
        check_share("grow.smoothing", self.smoothing, zero=True)
        check(self.max_times >= 1, "grow.max_times", self.max_times, "1 or more")


@dataclass(kw_only=True)
class Widening(Growth):
    """Growth in width."""

    noise: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.noise >= 0, "grow.noise", self.noise, "0 or more")


@dataclass(kw_only=True)
class Deepening(Growth):
    """Growth in depth."""

    start: str
    calibration_batches: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("grow.start", self.start, ("zero_gamma", "half_half"))
        check(self.calibration_batches >= 1, "grow.calibration_batches", self.calibration_batches, "1 or more")


@dataclass(kw_only=True)
class Priced(Widening):
    """Growth measured by the cost of the whole network."""

    cost: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("grow.cost", self.cost, COSTS)


@dataclass(kw_only=True)
class WhereKept(Limited, Priced, Deepening):
    """Growth where pruning left the channels."""

    keep_fraction: float
    operator: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("grow.keep_fraction", self.keep_fraction, "the channels", one=True)
        check_one_of("grow.operator", self.operator, ("wider", "deeper", "auto"))


@dataclass(kw_only=True)
class Wider(Planned, Widening, option="wider"):
    """Net2WiderNet: more channels."""

    factor: float
    where: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.factor > 1, "grow.factor", self.factor, "above 1")


@dataclass(kw_only=True)
class Deeper(Planned, Deepening, option="deeper"):
    """Net2DeeperNet: more layers or blocks."""

    operator: str
    kernel: int
    where: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("grow.operator", self.operator, ("block", "layer"))
        check(self.kernel >= 1 and self.kernel % 2 == 1, "grow.kernel", self.kernel, "odd")


@dataclass(kw_only=True)
class MorphNetExpansion(Priced, option="morphnet"):
    """MorphNet's expansion: after each round of shrinking, widen everything to the target cost."""

    epoch_keys = ("round_epochs",)

    target: float
    rounds: int
    round_epochs: int
    inherit: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.target > 0, "grow.target", self.target, "above 0, as a multiple of the first network's cost")
        check(self.rounds >= 1, "grow.rounds", self.rounds, "1 or more")
        check(self.round_epochs >= 1, "grow.round_epochs", self.round_epochs, "1 or more epochs")
        apart = self.inherit or self.new_lr_factor == 1
        check(apart, "grow.new_lr_factor", self.new_lr_factor, "1 with grow.inherit=false: all weights are new then")


@dataclass(kw_only=True)
class Selective(Planned, WhereKept, option="selective"):
    """Growth to a target cost, only where pruning left the channels."""

    target: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.target > 0, "grow.target", self.target, "above 0, as a multiple of the first network's cost")


@dataclass(kw_only=True)
class Adaptive(WhereKept, option="adaptive"):
    """Growth, pruning and learning rate by rules instead of a plan."""

    patience: int
    smoothing: float
    low_accuracy: float
    high_accuracy: float
    step: float
    lasso_factor: float
    lr_factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.patience >= 2, "grow.patience", self.patience, "2 or more epochs")
        check_share("grow.smoothing", self.smoothing, zero=True)
        check_share("grow.low_accuracy", self.low_accuracy, zero=True, one=True)
        rising = self.low_accuracy <= self.high_accuracy <= 1
        check(rising, "grow.high_accuracy", self.high_accuracy, f"{self.low_accuracy} (grow.low_accuracy) to 1")
        check(self.step > 1, "grow.step", self.step, "above 1")
        check(self.lasso_factor > 1, "grow.lasso_factor", self.lasso_factor, "above 1")
        check_share("grow.lr_factor", self.lr_factor, "the learning rate")
