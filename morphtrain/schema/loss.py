"""Options of the group `loss`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check_share
from morphtrain.schema.option import Option


@dataclass
class Loss(Option, group="loss"):
    """Base of the losses."""


@dataclass
class CrossEntropy(Loss, option="cross_entropy"):
    """The mean cross-entropy."""

    label_smoothing: float

    def __post_init__(self) -> None:
        check_share("loss.label_smoothing", self.label_smoothing, "each label", zero=True)
