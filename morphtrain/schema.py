"""The typed config: one dataclass a group option, its ranges checked where they are declared.

`conf/` holds the defaults and explains every key; this module holds types and ranges, and imports neither torch nor
anything else that is slow. `parse` turns a composed Hydra config into these dataclasses, or raises a `UserError` that
names the key, the value and what would work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from morphtrain.errors import UserError

METRICS = (
    "train_loss",
    "val_loss",
    "val_accuracy",
    "epoch_seconds",
    "morph_seconds",
    "train_seconds",
    "samples_per_second",
    "params",
    "macs",
    "channel_density",
    "weight_density",
    "batch_size",
    "learning_rate",
    "peak_memory_bytes",
)


def check(ok: bool, key: str, value: object, wanted: str) -> None:
    """Raise the `UserError` of key `key` unless `ok`; `wanted` says which values work."""
    if not ok:
        raise UserError(f"{key}={value}: must be {wanted}")


def check_one_of(key: str, value: object, choices: tuple[object, ...]) -> None:
    check(value in choices, key, value, "one of " + ", ".join(map(str, choices)))


# -- model -----------------------------------------------------------------------------------------------------


@dataclass
class ResNet:
    name: str
    stages: int
    blocks: Any  # int, or one int per stage
    layers: int
    bottleneck: bool
    width: int
    downsample: bool
    shortcut: str

    def __post_init__(self) -> None:
        check(self.stages >= 1, "model.stages", self.stages, "1 or more")
        self._check_blocks()
        least = 3 if self.bottleneck else 1
        check(self.layers >= least, "model.layers", self.layers, f"{least} or more")
        check(self.width >= 1, "model.width", self.width, "1 or more channels")
        check_one_of("model.shortcut", self.shortcut, ("A", "B"))

    def _check_blocks(self) -> None:
        numbers = self.blocks if isinstance(self.blocks, list) else [self.blocks]
        fits = not isinstance(self.blocks, list) or len(numbers) == self.stages
        whole = all(type(n) is int and n >= 1 for n in numbers)
        wanted = f"a whole number of 1 or more, or a list of {self.stages} such (model.stages={self.stages})"
        check(fits and whole, "model.blocks", self.blocks, wanted)


# -- data ------------------------------------------------------------------------------------------------------


@dataclass
class Digits:
    name: str
    image_size: int
    shift: int

    def __post_init__(self) -> None:
        check(self.image_size >= 8, "data.image_size", self.image_size, "8 or more pixels")
        _check_shift(self.shift, self.image_size)


@dataclass
class Downloaded:
    """Fashion-MNIST, CIFAR-10: files below `root`, fetched on demand."""

    name: str
    root: str
    download: bool
    shift: int
    flip: bool
    train_samples: int | None

    def __post_init__(self) -> None:
        _check_shift(self.shift, 28)
        check(
            self.train_samples is None or self.train_samples >= 1,
            "data.train_samples",
            self.train_samples,
            "1 or more, or null for all",
        )


@dataclass
class Synthetic:
    name: str
    train_samples: int
    val_samples: int
    image_size: int
    in_channels: int
    num_classes: int
    noise: float

    def __post_init__(self) -> None:
        for key in ("train_samples", "val_samples", "image_size", "in_channels"):
            check(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "1 or more")
        check(self.num_classes >= 2, "data.num_classes", self.num_classes, "2 or more")
        check(self.noise >= 0, "data.noise", self.noise, "0 or more")


def _check_shift(shift: int, image_size: int) -> None:
    check(0 <= shift < image_size, "data.shift", shift, f"0 to {image_size - 1} pixels")


# -- prune, grow, batch_policy ---------------------------------------------------------------------------------


@dataclass
class Nothing:
    """An option that adds no method to the run."""

    name: str


@dataclass
class PruneTrain:
    name: str
    lasso_ratio: float
    group_weight: str
    update: str
    threshold: float
    interval: int
    start_epoch: int
    stop_epoch: int | None
    round_to: int
    min_channels: int
    residual: str

    def __post_init__(self) -> None:
        check(0 < self.lasso_ratio < 1, "prune.lasso_ratio", self.lasso_ratio, "between 0 and 1, both excluded")
        check_one_of("prune.group_weight", self.group_weight, ("none", "sqrt_size"))
        check_one_of("prune.update", self.update, ("proximal", "subgradient"))
        check(self.threshold > 0, "prune.threshold", self.threshold, "above 0 (the thesis: 1e-5 to 1e-1)")
        check(self.interval >= 1, "prune.interval", self.interval, "1 or more epochs")
        check(self.start_epoch >= 1, "prune.start_epoch", self.start_epoch, "1 or more (the first epoch is 1)")
        check(
            self.stop_epoch is None or self.stop_epoch >= self.start_epoch,
            "prune.stop_epoch",
            self.stop_epoch,
            f"prune.start_epoch={self.start_epoch} or later, or null",
        )
        check(self.round_to >= 1, "prune.round_to", self.round_to, "1 or more channels")
        check(self.min_channels >= 1, "prune.min_channels", self.min_channels, "1 or more channels")
        check_one_of("prune.residual", self.residual, ("union",))


@dataclass
class FixedBatch:
    name: str
    batch_size: int

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_policy.batch_size", self.batch_size, "1 or more images")


# -- precision, optimizer, schedule ----------------------------------------------------------------------------


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
    """cosine, linear: from the full learning rate to zero over the run."""

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


# -- tracking, timing ------------------------------------------------------------------------------------------


@dataclass
class MLflow:
    name: str
    uri: str | None
    experiment: str
    flush_seconds: float

    def __post_init__(self) -> None:
        check(self.experiment != "", "tracking.experiment", self.experiment, "a name")
        check(self.flush_seconds >= 0, "tracking.flush_seconds", self.flush_seconds, "0 or more seconds")


@dataclass
class Timing:
    name: str
    sync: str
    warmup_epochs: int

    def __post_init__(self) -> None:
        check_one_of("timing.sync", self.sync, ("edges", "each", "none"))
        check(self.warmup_epochs >= 0, "timing.warmup_epochs", self.warmup_epochs, "0 or more epochs")


# -- the whole -------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, type]] = {
    "model": {"resnet": ResNet},
    "data": {
        "digits": Digits,
        "fashion_mnist": Downloaded,
        "cifar10": Downloaded,
        "synthetic": Synthetic,
    },
    "prune": {"none": Nothing, "prunetrain": PruneTrain},
    "grow": {"none": Nothing},
    "precision": {"o0": Nothing, "o1": Autocast, "bf16": Nothing},
    "batch_policy": {"fixed": FixedBatch},
    "optimizer": {"sgd": SGD, "adamw": AdamW},
    "schedule": {"cosine": Annealing, "linear": Annealing, "milestones": Milestones},
    "tracking": {"none": Nothing, "mlflow": MLflow},
    "timing": {"default": Timing},
}


@dataclass
class Config:
    """A run. The groups hold the dataclass of the chosen option."""

    epochs: int
    seed: int
    device: str
    resume: str
    objective: list[str]
    model: Any
    data: Any
    prune: Any
    grow: Any
    precision: Any
    batch_policy: Any
    optimizer: Any
    schedule: Any
    tracking: Any
    timing: Any

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        check(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device) is not None
        check(known, "device", self.device, "auto, cpu, cuda, cuda:N or mps")
        check(self.resume != "", "resume", self.resume, "never, auto, or the path of a checkpoint")
        check(len(self.objective) > 0, "objective", self.objective, "a list of at least one metric")
        recorded = METRICS + (("lasso_ratio",) if isinstance(self.prune, PruneTrain) else ())
        for metric in self.objective:
            check_one_of("objective", metric, recorded)


def parse(composed: DictConfig) -> Config:
    """The typed config of a composed one; raises `UserError` for an unknown key, a wrong type or range."""
    values: dict[str, Any] = {}
    for field in fields(Config):
        if field.name not in composed:
            raise UserError(f"{field.name}: missing from the config")
    for key in map(str, composed):
        if key not in {field.name for field in fields(Config)}:
            raise UserError(f"{key}: no such key; there are {', '.join(f.name for f in fields(Config))}")
    for group, options in OPTIONS.items():
        node = composed[group]
        name = OmegaConf.select(node, "name") if isinstance(node, DictConfig) else node
        check_one_of(f"{group}.name", name, tuple(options))
        values[group] = _typed(options[name], node, group)
    top = {f.name: composed[f.name] for f in fields(Config) if f.name not in OPTIONS}
    plain = _typed(_TopLevel, OmegaConf.create(top), "")
    return Config(**vars(plain), **values)


@dataclass
class _TopLevel:
    epochs: int
    seed: int
    device: str
    resume: str
    objective: list[str]


def _typed(kind: type, node: DictConfig, group: str) -> Any:
    """An instance of dataclass `kind`, its fields converted from `node` by OmegaConf's rules."""
    prefix = f"{group}." if group else ""
    names = [field.name for field in fields(kind)]
    for key in map(str, node):
        if key not in names:
            raise UserError(f"{prefix}{key}: no such key; {group} has {', '.join(names)}")
    for name in names:
        if name not in node or OmegaConf.is_missing(node, name):
            raise UserError(f"{prefix}{name}: missing; give it a value")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), node))
    except OmegaConfBaseException as error:
        key = f"{prefix}{error.key}" if error.key is not None else group
        value = OmegaConf.select(node, str(error.key)) if error.key is not None else node
        wanted = str(error).splitlines()[0]
        raise UserError(f"{key}={value}: {wanted[0].lower()}{wanted[1:]}") from error
