"""Options of the group `precision`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.option import Option


@dataclass
class Precision(Option, group="precision", plain=("o0", "bf16", "auto")):
    """Base of the precisions."""


@dataclass
class Autocast(Precision, option="o1"):
    """Mixed precision: operations are cast, losses scaled."""

    dtype: str
    init_scale: float

    def __post_init__(self) -> None:
        check_one_of("precision.dtype", self.dtype, ("auto", "float16", "bfloat16"))
        check(self.init_scale > 0, "precision.init_scale", self.init_scale, "above 0")
