"""Options of the group `gradient`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check, check_one_of, check_share
from morphtrain.schema.option import Option


@dataclass
class Gradient(Option, group="gradient", plain=("none",)):
    """Base of the gradient methods."""


@dataclass
class Approximate(Gradient, option="approximate"):
    """Approximate gradients of some convolutions' weights."""

    metrics = ("approximated_share",)

    kind: str
    share: float
    every: int

    def __post_init__(self) -> None:
        check_one_of("gradient.kind", self.kind, ("zero", "top1", "random"))
        check_share("gradient.share", self.share, "the batches", one=True)
        check(self.every >= 1, "gradient.every", self.every, "1 or more; 1 is every convolution")


@dataclass
class SparseActivation(Gradient, option="sparse_activation"):
    """Sparse gradients at the outputs of convolutions."""

    metrics = ("gradient_zeros", "gradient_macs_saved")

    p: float

    def __post_init__(self) -> None:
        check_share("gradient.p", self.p, "the gradients")
