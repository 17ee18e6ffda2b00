"""The keys of an experiment's file (`conf/hydra/sweeper/experiment.yaml`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from morphtrain.schema.checks import check


@dataclass
class ArmKeys:
    """One of the configurations that are compared."""

    overrides: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  # arms whose overrides it has, too
    small: list[str] = field(default_factory=list)  # more overrides, at size=small
    medium: list[str] = field(default_factory=list)  # and at each of the other sizes
    full: list[str] = field(default_factory=list)
    thesis: list[str] = field(default_factory=list)
    role: str = "method"
    of: str | None = None
    epochs: float | None = None  # as a share of those that it would have
    width: float | None = None  # of the model, as a share of what it would be


@dataclass
class SizeKeys:
    """How large an experiment is."""

    seeds: list[int]
    overrides: list[str] = field(default_factory=list)


@dataclass
class ExperimentKeys:
    """What a file declares of an experiment; its arms are `ArmKeys`, its sizes `SizeKeys`, by name."""

    size: str
    question: str
    thesis: str
    claim: str
    limits: str
    analysis: str
    response: str
    margin: float
    x: str | None
    y: str | None
    inverse: bool
    arms: dict[Any, Any]
    sizes: dict[str, Any]
    attempts: int

    def __post_init__(self) -> None:
        check(self.attempts >= 1, "hydra.sweeper.attempts", self.attempts, "1 or more")
