"""Options of the groups `norm`, `precision`, `optimizer`, `schedule`, `tracking` and `timing`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check, check_one_of


@dataclass
class GhostNorm:
    name: str
    ghost_batch_size: int

    def __post_init__(self) -> None:
        check(self.ghost_batch_size >= 1, "norm.ghost_batch_size", self.ghost_batch_size, "1 or more samples")


@dataclass
class Autocast:
    name: str
    dtype: str
    init_scale: float

    def __post_init__(self) -> None:
        check_one_of("precision.dtype", self.dtype, ("auto", "float16", "bfloat16"))
        check(self.init_scale > 0, "precision.init_scale", self.init_scale, "above 0")


@dataclass
class SGD:
    name: str
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float

    def __post_init__(self) -> None:
        check(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "0 or more and below 1")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        check(
            not (self.nesterov and self.momentum == 0),
            "optimizer.nesterov",
            self.nesterov,
            "false when optimizer.momentum=0",
        )


@dataclass
class LARS(SGD):
    trust_coefficient: float

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "optimizer.trust_coefficient"
        check(self.trust_coefficient > 0, key, self.trust_coefficient, "above 0 (You et al.: 0.001)")


@dataclass
class AdamW:
    name: str
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        check(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        proper = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        check(proper, "optimizer.betas", self.betas, "two numbers, each 0 or more and below 1")
        check(self.eps > 0, "optimizer.eps", self.eps, "above 0")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")


@dataclass
class Annealing:
    """cosine, linear: from the full learning rate to zero over the run; constant: the full one."""

    name: str
    warmup_epochs: float

    def __post_init__(self) -> None:
        check(self.warmup_epochs >= 0, "schedule.warmup_epochs", self.warmup_epochs, "0 or more epochs")


@dataclass
class Milestones:
    name: str
    milestones: list[float]
    gamma: float
    warmup_epochs: float

    def __post_init__(self) -> None:
        rising = all(0 < m < 1 for m in self.milestones) and self.milestones == sorted(set(self.milestones))
        check(rising, "schedule.milestones", self.milestones, "rising fractions of the run, between 0 and 1")
        check(0 < self.gamma <= 1, "schedule.gamma", self.gamma, "above 0 and at most 1")
        check(self.warmup_epochs >= 0, "schedule.warmup_epochs", self.warmup_epochs, "0 or more epochs")


@dataclass
class MLflow:
    name: str
    uri: str | None
    experiment: str
    flush_seconds: float
    parent_run_id: str | None

    def __post_init__(self) -> None:
        check(self.experiment != "", "tracking.experiment", self.experiment, "a name")
        check(self.flush_seconds >= 0, "tracking.flush_seconds", self.flush_seconds, "0 or more seconds")


@dataclass
class Timing:
    name: str
    sync: str
    warmup_epochs: int
    cores: int | None
    when_busy: str
    reference: float

    def __post_init__(self) -> None:
        check_one_of("timing.sync", self.sync, ("edges", "each", "none"))
        check(self.warmup_epochs >= 0, "timing.warmup_epochs", self.warmup_epochs, "0 or more epochs")
        check(self.cores is None or self.cores >= 1, "timing.cores", self.cores, "1 or more, or null")
        check_one_of("timing.when_busy", self.when_busy, ("mark", "wait", "refuse"))
        check(0 <= self.reference <= 1, "timing.reference", self.reference, "a share of training's time, 0 to 1")
