"""Options of the group `optimizer`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check
from morphtrain.schema.option import Option


@dataclass
class Optimizer(Option, group="optimizer"):
    """Base of the optimizers."""

    lr: float

    def __post_init__(self) -> None:
        check(self.lr > 0, "optimizer.lr", self.lr, "above 0")


@dataclass
class Momentum(Optimizer):
    """Base of those with momentum."""

    momentum: float
    nesterov: bool
    weight_decay: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "0 or more and below 1")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        check(
            not (self.nesterov and self.momentum == 0),
            "optimizer.nesterov",
            self.nesterov,
            "false when optimizer.momentum=0",
        )


@dataclass
class SGD(Momentum, option="sgd"):
    """Stochastic gradient descent with momentum."""

    fused: bool


@dataclass
class ISGD(SGD, option="isgd"):
    """Inconsistent SGD: with extra steps for batches with a high loss."""

    metrics = ("accelerated_batches", "extra_passes")

    sigmas: float
    stop: int
    eps: float
    zeta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.sigmas >= 0, "optimizer.sigmas", self.sigmas, "0 or more (Wang et al.: 3)")
        check(self.stop >= 1, "optimizer.stop", self.stop, "1 or more steps (Wang et al.: 5)")
        check(self.eps >= 0, "optimizer.eps", self.eps, "0 or more (Wang et al.: 0.1)")
        check(self.zeta > 0, "optimizer.zeta", self.zeta, "above 0, as a multiple of the learning rate")


@dataclass
class LARS(Momentum, option="lars"):
    """Layer-wise adaptive rate scaling."""

    trust_coefficient: float

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "optimizer.trust_coefficient"
        check(self.trust_coefficient > 0, key, self.trust_coefficient, "above 0 (You et al.: 0.001)")


@dataclass
class AdamW(Optimizer, option="adamw"):
    """Adam with decoupled weight decay."""

    betas: list[float]
    eps: float
    weight_decay: float
    fused: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        proper = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        check(proper, "optimizer.betas", self.betas, "two numbers, each 0 or more and below 1")
        check(self.eps > 0, "optimizer.eps", self.eps, "above 0")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
