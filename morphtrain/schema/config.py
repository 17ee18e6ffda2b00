"""The whole config of a command: its top-level keys, its groups and their options, and what asks what of which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from morphtrain.byte_sizes import byte_count, left_of
from morphtrain.errors import UserError, first_line
from morphtrain.schema.batch_policy import AdaBatch, FillMemory, FixedBatch
from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.data import Digits, Downloaded, ImageFolder, Synthetic
from morphtrain.schema.grow import Adaptive, Deeper, GrowMorphNet, Planned, Selective, Wider
from morphtrain.schema.model import VGG, AlexNet, Custom, MobileNet, ResNet, Torchvision
from morphtrain.schema.prune import MorphNet, PruneTrain
from morphtrain.schema.training import LARS, SGD, AdamW, Annealing, Autocast, GhostNorm, Milestones, MLflow, Timing

CALIBRATED = ("reference_seconds", "calibrated_seconds", "calibrated_train_seconds")  # not with timing.reference=0
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
    "contended",
    *CALIBRATED,
)


MEMORY_FORMATS = ("contiguous", "channels_last")


@dataclass
class Nothing:
    """An option that adds no method to the run."""

    name: str


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
class _TopLevel:
    epochs: int
    seed: int
    device: str
    memory_format: str
    resume: str
    architecture: str | None
    objective: list[str]
    trial: int | None
    clip_norm: float | None


@dataclass
class Config(_TopLevel):
    """A run. The groups hold the dataclass of the chosen option."""

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
        check_one_of("memory_format", self.memory_format, MEMORY_FORMATS)
        check(self.resume != "", "resume", self.resume, "never, auto, or the path of a checkpoint")
        check(len(self.objective) > 0, "objective", self.objective, "a list of at least one metric")
        check(self.trial is None or self.trial >= 0, "trial", self.trial, "null; a sweep sets it")
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
            measured = self.timing.reference > 0 or metric not in CALIBRATED
            check(measured, "timing.reference", self.timing.reference, f"above 0 for objective={metric}")

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


def stored_option(group: str, stored: Mapping[str, Any]) -> Any:
    """The dataclass of a group's option from a checkpoint's plain data; raises `UserError` for what is none of ours."""
    options = OPTIONS[group]
    name = option_of(stored)
    check_one_of(f"{group}.name", name, tuple(options))
    return options[name](**stored)


@dataclass
class _MaxBatchKeys:
    budget: Any  # str or number
    overhead: Any
    device: str
    memory_format: str
    input_shape: list[int] | None
    num_classes: int | None
    throughput_seconds: float

    def __post_init__(self) -> None:
        check(self.budget_bytes > 0, "budget", self.budget, "above 0 bytes")
        check(self.usable_bytes > 0, "overhead", self.overhead, f"less than budget={self.budget}")
        _check_device(self.device)
        check_one_of("memory_format", self.memory_format, MEMORY_FORMATS)
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
        return left_of("overhead", self.budget_bytes, self.overhead)


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


def _custom(node: DictConfig) -> Custom:
    """All keys but `_target_` are the network's, with nothing but plain containers in them."""
    for key in ("_target_", *node):
        if key not in node:
            raise UserError(f"model.{key}: missing; give it a value")
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {first_line(error)}") from error
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
        wanted = first_line(error)
        raise UserError(f"{key}={value}: {wanted[0].lower()}{wanted[1:]}") from error
