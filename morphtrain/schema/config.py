"""The whole config of a run: its top-level keys, and the chosen option of each group."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from morphtrain.errors import UserError
from morphtrain.schema.batch_policy import BatchPolicy
from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.compatibility import check_compatible
from morphtrain.schema.custom import Custom
from morphtrain.schema.data import CustomData, Data
from morphtrain.schema.gradient import Gradient
from morphtrain.schema.grow import Grow
from morphtrain.schema.loss import Loss
from morphtrain.schema.model import CustomModel, Model
from morphtrain.schema.norm import Norm
from morphtrain.schema.optimizer import Optimizer
from morphtrain.schema.option import Option
from morphtrain.schema.precision import Precision
from morphtrain.schema.prune import Prune
from morphtrain.schema.schedule import Schedule
from morphtrain.schema.timing import Timing
from morphtrain.schema.tracking import Tracking
from morphtrain.wording import nearest

# Times to an accuracy, and the clock of each; absent with timing.target_accuracy=null.
TO_ACCURACY = {"time_to_accuracy": "train_seconds", "calibrated_time_to_accuracy": "calibrated_train_seconds"}
# Absent with timing.reference=0.
CALIBRATED = ("reference_seconds", "calibrated_seconds", "calibrated_train_seconds", "calibrated_time_to_accuracy")
TESTED = ("test_loss", "test_accuracy")  # recorded once, at the end
COMMUNICATED = ("comm_seconds", "comm_bytes")  # absent in one process
RAW = ("raw_val_loss", "raw_val_accuracy")  # of the weights as trained, only with `ema`
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
    "changed",
    "median_epoch_seconds",
    "time_to_accuracy",
    *CALIBRATED,
    *COMMUNICATED,
)

MEMORY_FORMATS = ("contiguous", "channels_last")
CHOSEN = ("memory_format", "precision")  # keys that may be `auto`
COMPILE = ("none", "default", "max")


@dataclass
class TopLevel:
    """The keys of a run that belong to no group."""

    epochs: int
    seed: int
    device: str
    memory_format: str
    chosen: dict[str, str] | None
    processes: int | None
    process_timeout: float
    compile: Any  # one of COMPILE; Any, so that true and null are named as they were typed
    resume: str
    resume_schedule: str | None
    architecture: str | None
    objective: list[str]
    trial: int | None
    clip_norm: float | None
    stop_at: float | None
    ema: float | None

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        check(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        check_device(self.device)
        check_one_of("memory_format", self.memory_format, (*MEMORY_FORMATS, "auto"))
        check(self.processes is None or self.processes >= 1, "processes", self.processes, "1 or more, or null")
        wanted_seconds = "above 0, and at most 604800 (a week)"
        check(0 < self.process_timeout <= 604800, "process_timeout", self.process_timeout, wanted_seconds)
        wanted = f"one of {', '.join(COMPILE)}; default compiles, none does not"
        check(self.compile in COMPILE, "compile", self.compile, wanted)
        check(self.resume != "", "resume", self.resume, "never, auto, or the path of a checkpoint")
        modes = (None, "stretch", "append")
        wanted = "stretch or append (more epochs for a run that goes on), or null"
        check(self.resume_schedule in modes, "resume_schedule", self.resume_schedule, wanted)
        check(self.architecture != "", "architecture", self.architecture, "the path of a checkpoint, or null")
        check(len(self.objective) > 0, "objective", self.objective, "a list of at least one metric")
        check(len(set(self.objective)) == len(self.objective), "objective", self.objective, "different metrics")
        check(self.trial is None or self.trial >= 0, "trial", self.trial, "null; a sweep sets it")
        check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0, or null")
        in_range = self.stop_at is None or 0 < self.stop_at <= 1
        check(in_range, "stop_at", self.stop_at, "a val_accuracy above 0 and at most 1, or null")
        check_half_life(self.ema)


@dataclass
class Config(TopLevel):
    """The config of a run: every group holds the dataclass of the chosen option, or the user's own part."""

    model: Model | CustomModel
    data: Data | CustomData
    prune: Prune | Custom
    grow: Grow | Custom
    methods: list[Custom]  # further methods, the user's own
    norm: Norm | Custom
    precision: Precision | Custom
    gradient: Gradient | Custom
    batch_policy: BatchPolicy | Custom
    optimizer: Optimizer | Custom
    loss: Loss | Custom
    schedule: Schedule | Custom
    tracking: Tracking | Custom
    timing: Timing

    def __post_init__(self) -> None:
        super().__post_init__()
        check_compatible(self)
        self._check_chosen()
        for metric in self.objective:
            check(metric not in TESTED, "objective", metric, "another metric: no decision may see the test images")
            if not self.records_more and metric not in self.recorded:
                raise UserError(f"objective={metric}: no such metric; {nearest(metric, self.recorded)}")
            measured = self.timing.reference > 0 or metric not in CALIBRATED
            check(measured, "timing.reference", self.timing.reference, f"above 0 for objective={metric}")
            aimed = self.timing.target_accuracy is not None or metric not in TO_ACCURACY
            check(aimed, "timing.target_accuracy", None, f"a val_accuracy, 0 to 1, for objective={metric}")

    @property
    def automatic(self) -> list[str]:
        """The keys that are `auto`: what they stand for is measured."""
        values = {"memory_format": self.memory_format, "precision": self.precision.name}
        return [key for key in CHOSEN if values[key] == "auto"]

    def _check_chosen(self) -> None:
        if self.chosen is None:
            return
        check(len(self.automatic) > 0, "chosen", self.chosen, "null: no key is auto")
        wanted = f"null, or a value of each key that is auto: {{{', '.join(f'{key}: ...' for key in self.automatic)}}}"
        check(self.chosen.keys() == {*self.automatic}, "chosen", self.chosen, wanted)

    @property
    def recorded(self) -> tuple[str, ...]:
        """The metrics in every epoch's record, apart from those of custom parts."""
        own = (metric for part in vars(self).values() if isinstance(part, Option) for metric in part.metrics)
        early = ("stopped_early",) if self.stop_at is not None else ()
        raw = RAW if self.ema is not None else ()
        return (*METRICS, *own, *early, *raw, *self.data.recorded)

    @property
    def records_more(self) -> bool:
        """Whether methods of the user's own take part, which record what they like."""
        methods = (self.prune, self.grow, self.gradient, self.batch_policy)
        return bool(self.methods) or any(isinstance(method, Custom) for method in methods)

    @property
    def reshapes(self) -> bool:
        """Whether the network is meant to change while it trains."""
        return self.prune.name != "none" or self.grow.name != "none"

    @property
    def first_batch_size(self) -> int:
        """Images in the first training step."""
        policy = self.batch_policy
        return policy.batch_size if isinstance(policy, BatchPolicy) else int(policy.arguments["batch_size"])


def check_device(device: str) -> None:
    """Raise a `UserError` naming key `device` unless it is the name of a device."""
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", device) is not None
    check(known, "device", device, "auto, cpu, cuda, cuda:N or mps")


def check_half_life(ema: float | None) -> None:
    """Raise a `UserError` naming key `ema` unless it is a half-life."""
    check(ema is None or ema > 0, "ema", ema, "a half-life in epochs, above 0, or null")
