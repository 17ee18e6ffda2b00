"""Options of the group `batch_policy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from morphtrain.byte_sizes import byte_count, left_of
from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.option import Option


@dataclass
class BatchPolicy(Option, group="batch_policy"):
    """Base of the batch policies; `batch_size` is the size of the first training step."""

    batch_size: int

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_policy.batch_size", self.batch_size, "1 or more images")


@dataclass
class FixedBatch(BatchPolicy, option="fixed"):
    """The same batch size throughout."""

    max_micro_batch: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_micro_batch(self.max_micro_batch)


@dataclass
class AdaBatch(BatchPolicy, option="adabatch"):
    """A batch size that is multiplied every few epochs."""

    epoch_keys = ("every",)

    factor: int
    every: int
    max_batch_size: int | None
    lr_scaling: str
    warmup_epochs: float
    max_micro_batch: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_growth(self.lr_scaling, self.warmup_epochs)
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
class FillMemory(BatchPolicy, option="fill_memory"):
    """The largest batch that a memory budget allows, after every structural change."""

    budget: Any  # int, text with a unit, or None
    overhead: Any  # int, share, or text
    multiple_of: int
    max_factor: float
    lr_scaling: str
    warmup_epochs: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_growth(self.lr_scaling, self.warmup_epochs)
        if self.budget is not None:
            above = byte_count("batch_policy.budget", self.budget) > 0
            check(above, "batch_policy.budget", self.budget, "above 0, or null")
        # With budget=null only the device knows the budget: an overhead in bytes may turn out too large, a share never.
        size = byte_count("batch_policy.budget", self.budget) if self.budget is not None else float("inf")
        left = left_of("batch_policy.overhead", size, self.overhead)
        check(left > 0, "batch_policy.overhead", self.overhead, "less than batch_policy.budget")
        check(self.multiple_of >= 1, "batch_policy.multiple_of", self.multiple_of, "1 or more images")
        check(self.max_factor > 1, "batch_policy.max_factor", self.max_factor, "above 1")


def _check_micro_batch(size: int | None) -> None:
    check(size is None or size >= 1, "batch_policy.max_micro_batch", size, "1 or more images, or null")


def _check_growth(lr_scaling: str, warmup_epochs: float) -> None:
    check_one_of("batch_policy.lr_scaling", lr_scaling, ("linear", "sqrt", "none"))
    check(warmup_epochs >= 0, "batch_policy.warmup_epochs", warmup_epochs, "0 or more epochs")
