"""Options of the group `schedule`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check
from morphtrain.schema.option import Option


@dataclass
class Schedule(Option, group="schedule", plain=("cosine", "linear", "constant")):
    """The full learning rate throughout (constant), or from it to zero over the run (cosine, linear)."""

    warmup_epochs: float

    def __post_init__(self) -> None:
        check(self.warmup_epochs >= 0, "schedule.warmup_epochs", self.warmup_epochs, "0 or more epochs")


@dataclass
class Milestones(Schedule, option="milestones"):
    """The learning rate times `gamma` at each milestone."""

    milestones: list[float]
    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(0 < m < 1 for m in self.milestones) and self.milestones == sorted(set(self.milestones))
        check(rising, "schedule.milestones", self.milestones, "rising fractions of the run, between 0 and 1")
        check(0 < self.gamma <= 1, "schedule.gamma", self.gamma, "above 0 and at most 1")
