"""The keys of `hydra/sweeper=morphtrain` that are numbers and names (`conf/hydra/sweeper/morphtrain.yaml`)."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check


@dataclass
class Sweeper:
    """How many trials, and when to give up."""

    n_trials: int
    n_jobs: int
    max_failure_rate: float
    heartbeat_seconds: float
    baseline: list[str] | None

    def __post_init__(self) -> None:
        check(self.n_trials >= 1, "hydra.sweeper.n_trials", self.n_trials, "1 or more")
        check(self.n_jobs >= 1, "hydra.sweeper.n_jobs", self.n_jobs, "1 or more")
        check(
            0 <= self.max_failure_rate <= 1, "hydra.sweeper.max_failure_rate", self.max_failure_rate, "a share, 0 to 1"
        )
        check(self.heartbeat_seconds > 0, "hydra.sweeper.heartbeat_seconds", self.heartbeat_seconds, "above 0")
