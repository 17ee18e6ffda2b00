"""The keys of an experiment's file (`conf/hydra/sweeper/experiment.yaml`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from morphtrain.schema.checks import check


@dataclass
class ArmKeys:
    """One of the configurations that are compared."""

    overrides: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)  # more overrides, at size=small
    thesis: list[str] = field(default_factory=list)  # and at size=thesis
    role: str = "method"
    of: str | None = None
    epochs: float | None = None  # as a share of those that it would have
    width: float | None = None  # of the model, as a share of what it would be

    def __post_init__(self) -> None:
        for key in ("epochs", "width"):
            share = getattr(self, key)
            check(share is None or share > 0, key, share, "above 0, a share of what it would be")


@dataclass
class SizeKeys:
    """How large an experiment is."""

    seeds: list[int]
    overrides: list[str] = field(default_factory=list)


@dataclass
class ExperimentKeys:
    """What is declared of an experiment beside its arms and sizes."""

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
    attempts: int

    def __post_init__(self) -> None:
        check(self.attempts >= 1, "hydra.sweeper.attempts", self.attempts, "1 or more")
