"""The keys of `hydra/sweeper=morphtrain` that are numbers and names (`conf/hydra/sweeper/morphtrain.yaml`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
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
    repeat: bool  # train what another trial has trained already
    heartbeat_seconds: float
    baseline: list[str] | None
    more_baselines: dict[str, Any]  # `MoreBaseline` by name
    params: dict[str, Any]
    shares: dict[str, Any]
    confirm: dict[str, Any]  # `Confirm`

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
        check_overrides("hydra.sweeper.baseline", self.baseline or [], ", or null")
        check(self.heartbeat_seconds > 0, "hydra.sweeper.heartbeat_seconds", self.heartbeat_seconds, "above 0")


@dataclass
class MoreBaseline:
    """A further baseline: trial 0 with these changes."""

    overrides: list[str] = field(default_factory=list)
    epochs: float | None = None  # as a share of trial 0's
    width: float | None = None  # of the model, as a share of trial 0's

    def check(self, at: str) -> None:
        """Raise a `UserError` for what is below key `at` and out of range."""
        check_overrides(f"{at}.overrides", self.overrides)
        for key in ("epochs", "width"):
            share = getattr(self, key)
            check(share is None or share > 0, f"{at}.{key}", share, "above 0, a share of trial 0's")

    @property
    def role(self) -> str:
        """What it is in an experiment (`morphtrain.evidence.experiment`)."""
        return "sooner" if self.epochs is not None else "narrower" if self.width is not None else "dense"


@dataclass
class Confirm:
    """Which trials run again at the end of a search, with how many seeds that it never saw."""

    best: int
    seeds: int

    def __post_init__(self) -> None:
        check(self.best >= 0, "hydra.sweeper.confirm.best", self.best, "a number of trials; 0: none runs again")
        check(self.seeds >= 3, "hydra.sweeper.confirm.seeds", self.seeds, "3 or more: with fewer there is no interval")


def check_overrides(key: str, overrides: list[str], more: str = "") -> None:
    """Raise a `UserError` unless these look like overrides; `more` says what else works."""
    typed = all("=" in override or override.startswith("~") for override in overrides)
    check(typed, key, overrides, f"a list of overrides, as [optimizer.lr=0.1]{more}")


def check_storage(address: str) -> None:
    """Raise `PasswordShown` for a study's address with a password that is written out."""
    instead = "PGPASSWORD or ~/.pgpass gives it to PostgreSQL, and '${oc.env:NAME}' stands for a variable of yours"
    check_no_password("hydra.sweeper.storage", INTERPOLATION.sub("***", address), instead)


def study_name(sweeper: Any) -> str:
    """The name of the study that config node `hydra.sweeper` describes; YAML takes some for numbers or truth values."""
    return str(sweeper.study_name)
