"""Options of the group `precision`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.option import Option

TYPES = ("auto", "float16", "bfloat16")
SMALLEST_SCALE = 1e-37


@dataclass
class Precision(Option, group="precision", plain=("o0", "bf16", "auto")):
    """Base of the precisions."""


@dataclass
class Mixed(Precision, option=("o1", "o2")):
    """Mixed precision: weights of 32 bits, operations (o1) or all layers (o2) in 16, losses scaled."""

    metrics = ("loss_scale", "skipped_steps", "underflow_share")

    dtype: str
    init_scale: float

    def __post_init__(self) -> None:
        check_one_of("precision.dtype", self.dtype, TYPES)
        wanted = "1e-37 to 1e+37: it and its inverse are numbers of 32 bits"
        within = SMALLEST_SCALE <= self.init_scale <= 1 / SMALLEST_SCALE
        check(within, "precision.init_scale", self.init_scale, wanted)


@dataclass
class Short(Precision, option="o3"):
    """16 bits throughout."""

    metrics = ("underflow_share",)

    dtype: str
    keep_batchnorm_fp32: bool

    def __post_init__(self) -> None:
        check_one_of("precision.dtype", self.dtype, TYPES)


@dataclass
class PureBfloat16(Precision, option="bf16_pure"):
    """bfloat16 throughout."""

    rounding: str

    def __post_init__(self) -> None:
        check_one_of("precision.rounding", self.rounding, ("masters", "stochastic"))


@dataclass
class FixedPoint(Precision, option="dfp16"):
    """Dynamic fixed point, emulated."""

    bits: int
    rounding: str

    def __post_init__(self) -> None:
        check(2 <= self.bits <= 16, "precision.bits", self.bits, "2 to 16")
        check_one_of("precision.rounding", self.rounding, ("nearest", "stochastic"))
