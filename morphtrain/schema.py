"""The typed config: one dataclass a group option, its ranges checked where they are declared.

`conf/` holds the defaults and explains every key; this module holds types and ranges, and imports neither torch nor
anything else that is slow. `parse` turns a composed Hydra config into these dataclasses, or raises a `UserError` that
names the key, the value and what would work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from morphtrain.byte_sizes import byte_count
from morphtrain.errors import UserError

METRICS = (
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "epoch_seconds",
    "data_seconds",
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

IMAGE_KINDS = ("cifar", "imagenet")  # small images and large ones: what stems and heads are made for


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
    stem: str

    def __post_init__(self) -> None:
        check(self.stages >= 1, "model.stages", self.stages, "1 or more")
        self._check_blocks()
        least = 3 if self.bottleneck else 1
        check(self.layers >= least, "model.layers", self.layers, f"{least} or more")
        check(self.width >= 1, "model.width", self.width, "1 or more channels")
        check_one_of("model.shortcut", self.shortcut, ("A", "B"))
        check_one_of("model.stem", self.stem, IMAGE_KINDS)

    def _check_blocks(self) -> None:
        numbers = self.blocks if isinstance(self.blocks, list) else [self.blocks]
        fits = not isinstance(self.blocks, list) or len(numbers) == self.stages
        whole = all(type(n) is int and n >= 1 for n in numbers)
        wanted = f"a whole number of 1 or more, or a list of {self.stages} such (model.stages={self.stages})"
        check(fits and whole, "model.blocks", self.blocks, wanted)


@dataclass
class VGG:
    name: str
    depth: int
    width: int
    batch_norm: bool
    head: str
    dropout: float | None

    def __post_init__(self) -> None:
        check_one_of("model.depth", self.depth, (8, 11, 13, 16))
        check(self.width >= 1, "model.width", self.width, "1 or more channels")
        check_one_of("model.head", self.head, IMAGE_KINDS)
        _check_dropout(self.dropout)


@dataclass
class AlexNet:
    name: str
    stem: str
    batch_norm: bool
    dropout: float | None

    def __post_init__(self) -> None:
        check_one_of("model.stem", self.stem, IMAGE_KINDS)
        _check_dropout(self.dropout)


@dataclass
class MobileNet:
    name: str
    version: int
    width_multiplier: float
    stem: str

    def __post_init__(self) -> None:
        check_one_of("model.version", self.version, (1, 2))
        check(self.width_multiplier > 0, "model.width_multiplier", self.width_multiplier, "above 0")
        check_one_of("model.stem", self.stem, IMAGE_KINDS)


@dataclass
class Torchvision:
    """A network of torchvision by its name there; `source` is what chooses this option."""

    source: str
    name: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        # A checkpoint's `options` come here, too: none of them may name a file to load.
        pretrained = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")
        for key, value in self.options.items():
            check(key not in pretrained, f"model.options.{key}", value, "left away: training starts from fresh weights")
            check(key != "num_classes", f"model.options.{key}", value, "left away: the data decides it")
            _check_plain(f"model.options.{key}", key, value)


@dataclass
class Custom:
    """The user's own network: what makes it, as a dotted path, and the keywords it is called with."""

    _target_: str
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        parts = self._target_.split(".")
        dotted = len(parts) > 1 and all(part.isidentifier() for part in parts)
        check(dotted, "model._target_", self._target_, "a class or function with its module, as in my_package.Net")
        for key, value in self.arguments.items():
            _check_plain(f"model.{key}", key, value)
            hydras = key.startswith("_") and key.endswith("_")
            check(not hydras, f"model.{key}", value, "left away: only _target_ has a meaning of its own")

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self._target_


def _check_dropout(dropout: float | None) -> None:
    check(dropout is None or 0 <= dropout < 1, "model.dropout", dropout, "0 or more and below 1, or null")


def _check_plain(path: str, key: object, value: object) -> None:
    """A key whose values are free has to survive a checkpoint, which holds it as JSON."""
    try:
        survives = json.loads(json.dumps({key: value})) == {key: value}
    except TypeError:
        survives = False
    check(survives, path, value, "text, a number, true, false, null, or a list or dict (keys: text) of these")


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
    """Fashion-MNIST, CIFAR-10, CIFAR-100: files below `root`, fetched on demand."""

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
class ImageFolder:
    name: str
    root: str
    image_size: int
    resize: Any  # auto, or int
    min_scale: float
    flip: bool
    in_memory: Any  # auto, or bool
    memory_limit: Any  # auto, or float
    num_workers: Any  # auto, or int

    def __post_init__(self) -> None:
        check(self.image_size >= 1, "data.image_size", self.image_size, "1 or more pixels")
        self._check_auto("resize", int, self.image_size, f"{self.image_size} (data.image_size) or more pixels")
        check(0 < self.min_scale <= 1, "data.min_scale", self.min_scale, "above 0 and at most 1")
        self._check_auto("in_memory", bool, False, "true or false")
        self._check_auto("memory_limit", (int, float), 0, "0 or more GiB")
        self._check_auto("num_workers", int, 0, "0 or more processes")

    def _check_auto(self, key: str, kind: Any, least: Any, wanted: str) -> None:
        value = getattr(self, key)
        whole = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # True is an int to Python
        check(value == "auto" or (whole and value >= least), f"data.{key}", value, f"auto, or {wanted}")


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
    round_to: Any  # int, or "auto"
    min_channels: int
    residual: str
    ignore: list[str]

    def __post_init__(self) -> None:
        check(0 < self.lasso_ratio < 1, "prune.lasso_ratio", self.lasso_ratio, "between 0 and 1, both excluded")
        check_one_of("prune.group_weight", self.group_weight, ("none", "sqrt_size"))
        check_one_of("prune.update", self.update, ("proximal", "subgradient"))
        check(self.threshold > 0, "prune.threshold", self.threshold, "above 0 (the thesis: 1e-5 to 1e-1)")
        _check_dates(self)
        whole = type(self.round_to) is int and self.round_to >= 1
        check(whole or self.round_to == "auto", "prune.round_to", self.round_to, "1 or more channels, or auto")
        check_one_of("prune.residual", self.residual, ("union", "gating"))


COSTS = ("flops", "model_size", "latency")


@dataclass(kw_only=True)
class Growth:
    """What all ways to grow while training have in common."""

    name: str
    rewarm_epochs: float

    def __post_init__(self) -> None:
        check(self.rewarm_epochs >= 0, "grow.rewarm_epochs", self.rewarm_epochs, "0 or more epochs")


@dataclass(kw_only=True)
class Limited(Growth):
    """Growth within hard limits."""

    max_params: float | None
    max_macs: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_params", "max_macs"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"grow.{key}", value, "1 or more times the first network, or null")


@dataclass(kw_only=True)
class Planned(Limited):
    """Growth behind given epochs and on plateaus."""

    at_epochs: list[int]
    patience: int | None
    smoothing: float
    max_times: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(all(e >= 1 for e in self.at_epochs), "grow.at_epochs", self.at_epochs, "epochs, counted from 1")
        some = bool(self.at_epochs) or self.patience is not None
        check(some, "grow.at_epochs", self.at_epochs, "at least one epoch, or grow.patience a number")
        check(self.patience is None or self.patience >= 1, "grow.patience", self.patience, "1 or more epochs, or null")
        check(0 <= self.smoothing < 1, "grow.smoothing", self.smoothing, "0 or more and below 1")
        check(self.max_times >= 1, "grow.max_times", self.max_times, "1 or more")


@dataclass(kw_only=True)
class Wider(Planned):
    factor: float
    where: list[str]
    noise: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.factor > 1, "grow.factor", self.factor, "above 1")
        check(self.noise >= 0, "grow.noise", self.noise, "0 or more")


@dataclass(kw_only=True)
class Deeper(Planned):
    operator: str
    start: str
    kernel: int
    where: list[str]
    calibration_batches: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("grow.operator", self.operator, ("block", "layer"))
        check_one_of("grow.start", self.start, ("zero_gamma", "half_half"))
        check(self.kernel >= 1 and self.kernel % 2 == 1, "grow.kernel", self.kernel, "odd")
        check(self.calibration_batches >= 1, "grow.calibration_batches", self.calibration_batches, "1 or more")


@dataclass(kw_only=True)
class ToTarget:
    """What grows until the whole network costs something."""

    cost: str
    noise: float

    def check_cost(self) -> None:
        check_one_of("grow.cost", self.cost, COSTS)
        check(self.noise >= 0, "grow.noise", self.noise, "0 or more")


@dataclass(kw_only=True)
class WhereKept(ToTarget):
    """What grows where pruning left the channels."""

    keep_fraction: float
    operator: str
    start: str
    calibration_batches: int

    def check_kept(self) -> None:
        self.check_cost()
        check(0 < self.keep_fraction <= 1, "grow.keep_fraction", self.keep_fraction, "above 0 and at most 1")
        check_one_of("grow.operator", self.operator, ("wider", "deeper", "auto"))
        check_one_of("grow.start", self.start, ("zero_gamma", "half_half"))
        check(self.calibration_batches >= 1, "grow.calibration_batches", self.calibration_batches, "1 or more")


@dataclass(kw_only=True)
class GrowMorphNet(Growth, ToTarget):
    target: float
    rounds: int
    round_epochs: int
    inherit: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_cost()
        check(self.target > 0, "grow.target", self.target, "above 0 times the first network's cost")
        check(self.rounds >= 1, "grow.rounds", self.rounds, "1 or more")
        check(self.round_epochs >= 1, "grow.round_epochs", self.round_epochs, "1 or more epochs")


@dataclass(kw_only=True)
class Selective(Planned, WhereKept):
    target: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kept()
        check(self.target > 0, "grow.target", self.target, "above 0 times the first network's cost")


@dataclass(kw_only=True)
class Adaptive(Limited, WhereKept):
    patience: int
    smoothing: float
    low_accuracy: float
    high_accuracy: float
    step: float
    lasso_factor: float
    lr_factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kept()
        check(self.patience >= 2, "grow.patience", self.patience, "2 or more epochs")
        check(0 <= self.smoothing < 1, "grow.smoothing", self.smoothing, "0 or more and below 1")
        check(0 <= self.low_accuracy <= 1, "grow.low_accuracy", self.low_accuracy, "0 to 1")
        rising = self.low_accuracy <= self.high_accuracy <= 1
        check(rising, "grow.high_accuracy", self.high_accuracy, f"{self.low_accuracy} (grow.low_accuracy) to 1")
        check(self.step > 1, "grow.step", self.step, "above 1")
        check(self.lasso_factor > 1, "grow.lasso_factor", self.lasso_factor, "above 1")
        check(0 < self.lr_factor < 1, "grow.lr_factor", self.lr_factor, "between 0 and 1, both excluded")


@dataclass
class MorphNet:
    name: str
    cost: str
    regulariser: str
    lasso_ratio: float | None
    strength: float | None
    gamma_threshold: float
    interval: int
    start_epoch: int
    stop_epoch: int | None
    round_to: int
    min_channels: int
    ignore: list[str]

    def __post_init__(self) -> None:
        check_one_of("prune.cost", self.cost, COSTS)
        check_one_of("prune.regulariser", self.regulariser, ("gamma_l1", "group_lasso"))
        ratio, strength = self.lasso_ratio, self.strength
        if strength is None:
            wanted = "between 0 and 1, both excluded (or null, with prune.strength given)"
            check(ratio is not None and 0 < ratio < 1, "prune.lasso_ratio", ratio, wanted)
        else:
            check(strength > 0, "prune.strength", strength, "above 0, or null")
            check(ratio is None, "prune.lasso_ratio", ratio, f"null when prune.strength={strength} says how strong")
        check(self.gamma_threshold > 0, "prune.gamma_threshold", self.gamma_threshold, "above 0 (usual: 1e-3 to 1e-2)")
        _check_dates(self)
        check(self.round_to >= 1, "prune.round_to", self.round_to, "1 or more channels")


def _check_dates(option: PruneTrain | MorphNet) -> None:
    """What all pruning methods agree on: when they act, and how much they leave."""
    check(option.interval >= 1, "prune.interval", option.interval, "1 or more epochs")
    check(option.start_epoch >= 1, "prune.start_epoch", option.start_epoch, "1 or more (the first epoch is 1)")
    check(
        option.stop_epoch is None or option.stop_epoch >= option.start_epoch,
        "prune.stop_epoch",
        option.stop_epoch,
        f"prune.start_epoch={option.start_epoch} or later, or null",
    )
    check(option.min_channels >= 1, "prune.min_channels", option.min_channels, "1 or more channels")


@dataclass
class FixedBatch:
    name: str
    batch_size: int
    max_micro_batch: int | None

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_policy.batch_size", self.batch_size, "1 or more images")
        _check_micro_batch(self.max_micro_batch)


@dataclass
class AdaBatch:
    name: str
    batch_size: int
    factor: int
    every: int
    max_batch_size: int | None
    lr_scaling: str
    warmup_epochs: float
    max_micro_batch: int | None

    def __post_init__(self) -> None:
        _check_growth(self.batch_size, self.lr_scaling, self.warmup_epochs)
        _check_micro_batch(self.max_micro_batch)
        check(self.factor >= 2, "batch_policy.factor", self.factor, "2 or more")
        check(self.every >= 1, "batch_policy.every", self.every, "1 or more epochs")
        check(
            self.max_batch_size is None or self.max_batch_size >= self.batch_size,
            "batch_policy.max_batch_size",
            self.max_batch_size,
            f"batch_policy.batch_size={self.batch_size} or more, or null",
        )


@dataclass
class FillMemory:
    name: str
    batch_size: int
    budget: Any  # int, text with a unit, or None
    multiple_of: int
    max_factor: float
    lr_scaling: str
    warmup_epochs: float

    def __post_init__(self) -> None:
        _check_growth(self.batch_size, self.lr_scaling, self.warmup_epochs)
        if self.budget is not None:
            above = byte_count("batch_policy.budget", self.budget) > 0
            check(above, "batch_policy.budget", self.budget, "above 0, or null")
        check(self.multiple_of >= 1, "batch_policy.multiple_of", self.multiple_of, "1 or more images")
        check(self.max_factor > 1, "batch_policy.max_factor", self.max_factor, "above 1")


def _check_micro_batch(size: int | None) -> None:
    check(size is None or size >= 1, "batch_policy.max_micro_batch", size, "1 or more images, or null")


def _check_growth(batch_size: int, lr_scaling: str, warmup_epochs: float) -> None:
    check(batch_size >= 1, "batch_policy.batch_size", batch_size, "1 or more images")
    check_one_of("batch_policy.lr_scaling", lr_scaling, ("linear", "sqrt", "none"))
    check(warmup_epochs >= 0, "batch_policy.warmup_epochs", warmup_epochs, "0 or more epochs")


# -- norm, precision, optimizer, schedule ----------------------------------------------------------------------


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
    "model": {
        "resnet": ResNet,
        "vgg": VGG,
        "alexnet": AlexNet,
        "mobilenet": MobileNet,
        "torchvision": Torchvision,
        "custom": Custom,
    },
    "data": {
        "digits": Digits,
        "fashion_mnist": Downloaded,
        "cifar10": Downloaded,
        "cifar100": Downloaded,
        "image_folder": ImageFolder,
        "synthetic": Synthetic,
    },
    "prune": {"none": Nothing, "prunetrain": PruneTrain, "morphnet": MorphNet},
    "grow": {
        "none": Nothing,
        "wider": Wider,
        "deeper": Deeper,
        "morphnet": GrowMorphNet,
        "selective": Selective,
        "adaptive": Adaptive,
    },
    "norm": {"batch": Nothing, "ghost": GhostNorm},
    "precision": {"o0": Nothing, "o1": Autocast, "bf16": Nothing},
    "batch_policy": {"fixed": FixedBatch, "adabatch": AdaBatch, "fill_memory": FillMemory},
    "optimizer": {"sgd": SGD, "lars": LARS, "adamw": AdamW},
    "schedule": {"constant": Annealing, "cosine": Annealing, "linear": Annealing, "milestones": Milestones},
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
    architecture: str | None
    objective: list[str]
    clip_norm: float | None
    model: Any
    data: Any
    prune: Any
    grow: Any
    norm: Any
    precision: Any
    batch_policy: Any
    optimizer: Any
    schedule: Any
    tracking: Any
    timing: Any

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        check(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        _check_device(self.device)
        check(self.resume != "", "resume", self.resume, "never, auto, or the path of a checkpoint")
        check(len(self.objective) > 0, "objective", self.objective, "a list of at least one metric")
        check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0, or null")
        self._check_growth()
        rows = isinstance(self.prune, MorphNet) and self.prune.regulariser == "group_lasso"
        if rows and isinstance(self.optimizer, LARS):
            raise UserError(
                "prune.regulariser=group_lasso: would shrink all layers alike, where optimizer=lars takes steps of "
                "different sizes; prune.regulariser=gamma_l1 or optimizer=sgd works"
            )
        recorded = METRICS + (("lasso_ratio",) if isinstance(self.prune, PruneTrain | MorphNet) else ())
        for metric in self.objective:
            check_one_of("objective", metric, recorded)

    def _check_growth(self) -> None:
        """What a way to grow asks of the rest of the run."""
        grow, prune = self.grow, self.prune
        if isinstance(grow, (GrowMorphNet, Selective)) and prune.name == "none":
            raise UserError(f"grow={grow.name}: needs a method that shrinks; prune=prunetrain or prune=morphnet works")
        if isinstance(grow, Planned):
            late = [epoch for epoch in grow.at_epochs if epoch >= self.epochs]
            check(not late, "grow.at_epochs", grow.at_epochs, f"before the last epoch (epochs={self.epochs})")
        if isinstance(grow, GrowMorphNet):
            end = grow.rounds * grow.round_epochs
            wanted = f"so that the last round ends before epochs={self.epochs} (now: behind epoch {end})"
            check(end < self.epochs, "grow.rounds", grow.rounds, wanted)
            stops = prune.stop_epoch is not None and prune.stop_epoch <= end
            wanted = f"grow.rounds * grow.round_epochs = {end} or earlier, or what grew would be shrunk again"
            check(stops, "prune.stop_epoch", prune.stop_epoch, wanted)


def _check_device(device: str) -> None:
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", device) is not None
    check(known, "device", device, "auto, cpu, cuda, cuda:N or mps")


def keywords(option: Any) -> dict[str, Any]:
    """All keys of an option but its name: the keywords of what it describes, where that calls them alike."""
    return {field.name: getattr(option, field.name) for field in fields(option) if field.name != "name"}


def option_of(node: Mapping[Any, Any]) -> Any:
    """Which option of its group a node is, be it composed, stored, or the `vars` of its dataclass.

    The option's own name is in `name`, unless that is taken: then in `source`. A `_target_` makes it the user's own.
    """
    keys = set(node)  # of a composed node, `in` would deny keys that still miss their value
    if "_target_" in keys:
        return "custom"
    return node.get("source" if "source" in keys else "name")


def stored_model(stored: Mapping[str, Any]) -> Any:
    """The model's dataclass from the plain data of a checkpoint; raises `UserError` for what is none of ours."""
    return stored_option("model", stored)


def stored_option(group: str, stored: Mapping[str, Any]) -> Any:
    """The dataclass of a group's option from plain data; raises `UserError` for what is none of ours."""
    options = OPTIONS[group]
    name = option_of(stored)
    check_one_of(f"{group}.name", name, tuple(options))
    return options[name](**stored)


@dataclass
class _MaxBatchKeys:
    budget: Any  # str or number
    overhead: Any
    device: str
    input_shape: list[int] | None
    num_classes: int | None
    throughput_seconds: float

    def __post_init__(self) -> None:
        check(self.budget_bytes > 0, "budget", self.budget, "above 0 bytes")
        check(self.usable_bytes > 0, "overhead", self.overhead, f"less than budget={self.budget}")
        _check_device(self.device)
        whole = self.input_shape is None or (len(self.input_shape) > 0 and min(self.input_shape) >= 1)
        check(whole, "input_shape", self.input_shape, "numbers of 1 or more, as [3,32,32], or null")
        check(self.num_classes is None or self.num_classes >= 2, "num_classes", self.num_classes, "2 or more, or null")
        check(self.throughput_seconds >= 0, "throughput_seconds", self.throughput_seconds, "0 or more seconds")

    @property
    def budget_bytes(self) -> float:
        """All of it."""
        return byte_count("budget", self.budget)

    @property
    def usable_bytes(self) -> float:
        """What is left of it for tensors."""
        text = str(self.overhead)
        size = byte_count("overhead", text.removesuffix("%"))
        share = size / 100 if text.endswith("%") else size
        return self.budget_bytes * (1 - share) if share < 1 or text.endswith("%") else self.budget_bytes - size


@dataclass
class MaxBatch(_MaxBatchKeys):
    """What `python -m morphtrain.maxbatch` is asked."""

    model: Any
    data: Any
    norm: Any
    precision: Any
    optimizer: Any


def parse(composed: DictConfig) -> Config:
    """The typed config of a composed one; raises `UserError` for an unknown key, a wrong type or range."""
    return _parse(Config, _TopLevel, composed)


def parse_max_batch(composed: DictConfig) -> MaxBatch:
    """The same for `conf/maxbatch.yaml`."""
    return _parse(MaxBatch, _MaxBatchKeys, composed)


def _parse(kind: Any, keys: type, composed: DictConfig) -> Any:
    """An instance of dataclass `kind`: its groups, and the fields of `keys`."""
    names = [field.name for field in fields(kind)]
    values: dict[str, Any] = {}
    for name in names:
        if name not in composed:
            raise UserError(f"{name}: missing; give it a value")
    for key in map(str, composed):
        if key not in names:
            raise UserError(f"{key}: no such key; there are {', '.join(names)}")
    for group in (name for name in names if name in OPTIONS):
        options, node = OPTIONS[group], composed[group]
        name = option_of(node) if isinstance(node, DictConfig) else node
        check_one_of(f"{group}.name", name, tuple(options))
        values[group] = _custom(node) if options[name] is Custom else _typed(options[name], node, group)
    top = {name: composed[name] for name in names if name not in OPTIONS}
    plain = _typed(keys, OmegaConf.create(top), "")
    return kind(**vars(plain), **values)


@dataclass
class _TopLevel:
    epochs: int
    seed: int
    device: str
    resume: str
    architecture: str | None
    objective: list[str]
    clip_norm: float | None


def _custom(node: DictConfig) -> Custom:
    """All keys but `_target_` are the network's, with nothing but plain containers in them."""
    for key in ("_target_", *node):
        if key not in node:
            raise UserError(f"model.{key}: missing; give it a value")
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return Custom(str(plain.pop("_target_")), plain)  # type: ignore[arg-type]  # keys are checked in there


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
