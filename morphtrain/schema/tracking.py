"""Options of the group `tracking`."""

from __future__ import annotations

from dataclasses import dataclass

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
        check(self.experiment != "", "tracking.experiment", self.experiment, "a name")
        check(self.flush_seconds >= 0, "tracking.flush_seconds", self.flush_seconds, "0 or more seconds")
