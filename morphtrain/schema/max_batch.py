"""The config of `python -m morphtrain.maxbatch` (`conf/maxbatch.yaml`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from morphtrain.byte_sizes import byte_count, left_of
from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.config import MEMORY_FORMATS, check_device, check_half_life
from morphtrain.schema.custom import Custom
from morphtrain.schema.data import Data
from morphtrain.schema.model import CustomModel, Model
from morphtrain.schema.norm import Norm
from morphtrain.schema.optimizer import Optimizer
from morphtrain.schema.precision import Precision

# Precisions that have no memory of their own to estimate, and why.
REFUSED = {"auto": "only a run measures which is fastest", "dfp16": "its emulation takes more memory than the format"}


@dataclass
class MaxBatchKeys:
    """The keys that belong to no group."""

    budget: Any  # str or number
    overhead: Any
    device: str
    memory_format: str
    input_shape: list[int] | None
    num_classes: int | None
    throughput_seconds: float
    ema: float | None

    def __post_init__(self) -> None:
        check(self.budget_bytes > 0, "budget", self.budget, "above 0 bytes")
        check(self.usable_bytes > 0, "overhead", self.overhead, f"less than budget={self.budget}")
        check_device(self.device)
        check_one_of("memory_format", self.memory_format, MEMORY_FORMATS)
        whole = self.input_shape is None or (len(self.input_shape) > 0 and min(self.input_shape) >= 1)
        check(whole, "input_shape", self.input_shape, "numbers of 1 or more, such as [3,32,32], or null")
        check(self.num_classes is None or self.num_classes >= 2, "num_classes", self.num_classes, "2 or more, or null")
        check(self.throughput_seconds >= 0, "throughput_seconds", self.throughput_seconds, "0 or more seconds")
        check_half_life(self.ema)

    @property
    def budget_bytes(self) -> float:
        """The whole budget."""
        return byte_count("budget", self.budget)

    @property
    def usable_bytes(self) -> float:
        """What the overhead leaves of the budget for tensors."""
        return left_of("overhead", self.budget_bytes, self.overhead)


@dataclass
class MaxBatch(MaxBatchKeys):
    """The config of the command."""

    model: Model | CustomModel
    data: Data | Custom
    norm: Norm | Custom
    precision: Precision | Custom
    optimizer: Optimizer | Custom

    def __post_init__(self) -> None:
        super().__post_init__()
        why = REFUSED.get(self.precision.name, "")
        check(not why, "precision", self.precision.name, f"another option: {why}")
