"""Option `dfp16` of the group `precision`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.precision import Precision


@dataclass
class FixedPoint(Precision, option="dfp16"):
    """Dynamic fixed point, emulated."""

    bits: int
    rounding: str

    def __post_init__(self) -> None:
        check(2 <= self.bits <= 16, "precision.bits", self.bits, "2 to 16")
        check_one_of("precision.rounding", self.rounding, ("nearest", "stochastic"))
