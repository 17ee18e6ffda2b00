"""Options of the group `norm`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check
from morphtrain.schema.option import Option


@dataclass
class Norm(Option, group="norm", plain=("batch", "sync")):
    """Base of the norms."""


@dataclass
class GhostNorm(Norm, option="ghost"):
    """Ghost batch norm."""

    ghost_batch_size: int

    def __post_init__(self) -> None:
        check(self.ghost_batch_size >= 1, "norm.ghost_batch_size", self.ghost_batch_size, "1 or more samples")


@dataclass
class WeightNorm(Norm, option="weight"):
    """Weight normalisation."""

    mean_only: bool
