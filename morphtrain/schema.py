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
        check(self.interval >= 1, "prune.interval", self.interval, "1 or more epochs")
        check(self.start_epoch >= 1, "prune.start_epoch", self.start_epoch, "1 or more (the first epoch is 1)")
        check(
            self.stop_epoch is None or self.stop_epoch >= self.start_epoch,
            "prune.stop_epoch",
            self.stop_epoch,
            f"prune.start_epoch={self.start_epoch} or later, or null",
        )
        whole = type(self.round_to) is int and self.round_to >= 1
        check(whole or self.round_to == "auto", "prune.round_to", self.round_to, "1 or more channels, or auto")
        check(self.min_channels >= 1, "prune.min_channels", self.min_channels, "1 or more channels")
        check_one_of("prune.residual", self.residual, ("union", "gating"))


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
        _check_device(self.device)
        check(self.resume != "", "resume", self.resume, "never, auto, or the path of a checkpoint")
        check(len(self.objective) > 0, "objective", self.objective, "a list of at least one metric")
        recorded = METRICS + (("lasso_ratio",) if isinstance(self.prune, PruneTrain) else ())
        for metric in self.objective:
            check_one_of("objective", metric, recorded)


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
    options = OPTIONS["model"]
    name = option_of(stored)
    check_one_of("model.name", name, tuple(options))
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
    objective: list[str]


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
