"""Options of the group `tracking`."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

from morphtrain.addresses import check_no_password, shown
from morphtrain.errors import UserError
from morphtrain.schema.checks import check
from morphtrain.schema.option import Option

VARIABLE = "MLFLOW_TRACKING_URI"  # takes the place of the key where that is null
MODES = ("online", "offline", "disabled")
MODE = "WANDB_MODE"  # takes the place of the key where that is null
OLD_MODES = {"run": "online", "dryrun": "offline"}  # which wandb takes there, too


@dataclass
class Tracking(Option, group="tracking", plain=("none", "csv")):
    """Base of the trackers."""

    also: Any = field(default_factory=list, kw_only=True)  # further ones, of which `parse` makes options


@dataclass
class MLflow(Tracking, option="mlflow"):
    """Records in MLflow."""

    uri: str | None
    experiment: str
    flush_seconds: float
    parent_run_id: str | None

    def __post_init__(self) -> None:
        if self.uri is not None:
            check_address(self.uri)
        places = {"tracking.uri": self.uri} if self.uri else {VARIABLE: os.environ.get(VARIABLE)}
        for key, uri in places.items():
            check(not _in_memory(uri or ""), key, shown(uri or ""), "a place that stays, such as sqlite:///mlflow.db")
        check(self.experiment != "", "tracking.experiment", self.experiment, "a name")
        check(self.flush_seconds >= 0, "tracking.flush_seconds", self.flush_seconds, "0 or more seconds")


@dataclass
class TensorBoard(Tracking, option="tensorboard"):
    """Event files for TensorBoard."""

    def __post_init__(self) -> None:
        _check_installed("tensorboard")


@dataclass
class Wandb(Tracking, option="wandb"):
    """Runs in Weights & Biases."""

    mode: str | None
    project: str
    entity: str | None

    def __post_init__(self) -> None:
        _check_installed("wandb")
        check(self.mode in (None, *MODES), "tracking.mode", self.mode, f"one of {', '.join(MODES)}, or null")
        if self.mode is None:
            check(wandb_mode() in MODES, MODE, wandb_mode(), f"one of {', '.join(MODES)}")
        wanted = r"a name without / \ # ? % or :"
        check(self.project != "" and not set(self.project) & set("/\\#?%:"), "tracking.project", self.project, wanted)
        check(self.entity != "", "tracking.entity", self.entity, "a user or team, or null")


def wandb_mode() -> str:
    """The mode of wandb where the config has none."""
    given = os.environ.get(MODE) or "online"
    return OLD_MODES.get(given, given)


def check_address(uri: str) -> None:
    """Raise `PasswordShown` for an address with a password: it would be in every file that a run leaves."""
    instead = (
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment give it to a server, and "
        "MLFLOW_TRACKING_URI with tracking.uri=null is used as it is and never written down"
    )
    check_no_password("tracking.uri", uri, instead)


def _in_memory(uri: str) -> bool:
    """Whether this is a SQLite database that ends with the process."""
    kind, _, path = uri.partition("://")
    return kind.partition("+")[0] == "sqlite" and (path.strip("/") in ("", ":memory:") or "mode=memory" in path)


def _check_installed(package: str) -> None:
    """Raise a `UserError` unless the package, called like its option and its extra, is there; imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"tracking={package}: not installed; pip install 'morphtrain[{package}]'")
