"""Options of the group `tracking`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.addresses import PasswordShown, shown
from morphtrain.schema.checks import check
from morphtrain.schema.option import Option


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
        check(self.experiment != "", "tracking.experiment", self.experiment, "a name")
        check(self.flush_seconds >= 0, "tracking.flush_seconds", self.flush_seconds, "0 or more seconds")


def check_address(uri: str) -> None:
    """Raise `PasswordShown` for an address with a password: it would be in every file that a run leaves."""
    wanted = (
        "must be an address without a password, since every file of a run would show it; MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD in the environment give it to a server, and MLFLOW_TRACKING_URI with "
        "tracking.uri=null is used as it is and never written down"
    )
    if shown(uri) != uri:
        raise PasswordShown(f"tracking.uri={shown(uri)}: {wanted}")
