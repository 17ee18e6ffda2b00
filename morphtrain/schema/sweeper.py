"""The keys of `hydra/sweeper=morphtrain` that are numbers and names (`conf/hydra/sweeper/morphtrain.yaml`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from morphtrain.addresses import check_no_password
from morphtrain.schema.checks import check, check_one_of

INTERPOLATION = re.compile(r"\$\{[^}]*\}")  # what the files show instead of its value


@dataclass
class Sweeper:
    """What is searched, how many trials, and when to give up."""

    study_name: str
    direction: Any  # a name, or a list of them
    n_trials: int
    n_jobs: int
    max_failure_rate: float
    heartbeat_seconds: float
    baseline: list[str] | None
    params: dict[str, Any]

    def __post_init__(self) -> None:
        name = self.study_name
        check(name != "", "hydra.sweeper.study_name", name, "a name, by which the study is found again")
        for direction in self.direction if isinstance(self.direction, list) else [self.direction]:
            check_one_of("hydra.sweeper.direction", direction, ("minimize", "maximize"))
        check(self.n_trials >= 1, "hydra.sweeper.n_trials", self.n_trials, "1 or more")
        check(self.n_jobs >= 1, "hydra.sweeper.n_jobs", self.n_jobs, "1 or more")
        check(
            0 <= self.max_failure_rate <= 1, "hydra.sweeper.max_failure_rate", self.max_failure_rate, "a share, 0 to 1"
        )
        typed = all("=" in override or override.startswith("~") for override in self.baseline or [])
        check(typed, "hydra.sweeper.baseline", self.baseline, "a list of overrides, as [optimizer.lr=0.1], or null")
        check(self.heartbeat_seconds > 0, "hydra.sweeper.heartbeat_seconds", self.heartbeat_seconds, "above 0")


def check_storage(address: str) -> None:
    """Raise `PasswordShown` for a study's address with a password that is written out."""
    instead = "PGPASSWORD or ~/.pgpass gives it to PostgreSQL, and '${oc.env:NAME}' stands for a variable of yours"
    check_no_password("hydra.sweeper.storage", INTERPOLATION.sub("***", address), instead)


def study_name(sweeper: Any) -> str:
    """The name of the study that config node `hydra.sweeper` describes; YAML takes some for numbers or truth values."""
    return str(sweeper.study_name)
