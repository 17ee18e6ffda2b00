"""Options of the group `tracking`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from morphtrain.addresses import check_no_password, shown
from morphtrain.schema.checks import check
from morphtrain.schema.option import Option

VARIABLE = "MLFLOW_TRACKING_URI"  # takes the place of the key where that is null


@dataclass
class Tracking(Option, group="tracking", plain=("none",)):
    """Base of the trackers."""


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
