"""Runs in MLflow: buffered, sent between epochs, and never a reason for training to stop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain import schema

# What MLflow would do by default: report to its makers, and wait minutes for a server that is gone. A user's own
# settings win.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
BATCH = 900  # metrics a call; MLflow takes 1000
RUN_DIR_TAG = "run_dir"

log = logging.getLogger(__name__)


class MLflowTracker:
    """Sends params, tags, one value an epoch of every metric, and files to one MLflow run.

    Args:
        uri: tracking store; None takes MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in the current directory.
        experiment: name of the MLflow experiment; made if there is none.
        flush_seconds: metrics are sent at most this often.
        run_id: the MLflow run to go on with.
    """

    def __init__(
        self, uri: str | None, experiment: str, flush_seconds: float = 10.0, run_id: str | None = None
    ) -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self.experiment = experiment
        self.flush_seconds = flush_seconds
        self.run_id = run_id
        self.sent_epoch = 0  # the last epoch MLflow has
        self.last_flush = time.monotonic()
        self.client: Any = None

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], run_dir: Path, resumed: bool) -> None:
        """Create the MLflow run, or find the one that `run_dir` belongs to and go on in it if `resumed`."""
        self._attempt("start", lambda: self._start(params, {**tags, RUN_DIR_TAG: str(run_dir)}, resumed))

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        """Send the epochs MLflow does not have, if the last sending is long enough ago."""
        if time.monotonic() - self.last_flush >= self.flush_seconds:
            self._flush(history)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file."""
        self._attempt(f"artifact {path.name}", lambda: self.client.log_artifact(self.run_id, str(path), folder))

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        """Send what is left and end the run as FINISHED, FAILED or KILLED."""
        self._flush(history)
        self._attempt("finish", lambda: self.client.set_terminated(self.run_id, status))

    def _start(self, params: Mapping[str, Any], tags: Mapping[str, str], resumed: bool) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        for name in ("alembic", "mlflow.store.db.utils"):  # their migrations, line by line
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(self.experiment)
        if resumed:
            self.run_id = self.run_id or _run_of(client, experiment_id, tags[RUN_DIR_TAG])
        if resumed and self.run_id:
            client.update_run(self.run_id, status="RUNNING")
            recorded = client.get_metric_history(self.run_id, "epoch_seconds")
            self.sent_epoch = max((metric.step for metric in recorded), default=0)
        else:
            name = " ".join(tags[key] for key in ("model", "prune", "precision"))
            run = client.create_run(experiment_id, tags=dict(tags), run_name=f"{name} seed {tags['seed']}")
            self.run_id = run.info.run_id
        client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in params.items()])
        self.client = client

    def _flush(self, history: Sequence[Mapping[str, float]]) -> None:
        self.last_flush = time.monotonic()
        self._attempt("metrics", lambda: self._send(history))

    def _send(self, history: Sequence[Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

        left = [record for record in history if record["epoch"] > self.sent_epoch]
        while left:
            epochs = left[: max(1, BATCH // len(left[0]))]
            metrics = [
                Metric(key, value, int(record["timestamp"] * 1000), int(record["epoch"]))
                for record in epochs
                for key, value in record.items()
                if key not in ("epoch", "timestamp")
            ]
            self.client.log_batch(self.run_id, metrics=metrics)
            self.sent_epoch = int(epochs[-1]["epoch"])
            left = left[len(epochs) :]

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        """Do `action`; a failure is reported and training goes on, whatever MLflow raised."""
        if self.client is None and what != "start":
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 (databases, servers and disks fail in too many ways to name)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("MLflow (%s): %s failed, training goes on: %s", self.uri, what, reason)


def _run_of(client: Any, experiment_id: str, run_dir: str) -> str | None:
    """The MLflow run that was started in `run_dir`."""
    quoted = run_dir.replace("\\", "\\\\").replace("'", "\\'")
    runs = client.search_runs([experiment_id], f"tags.{RUN_DIR_TAG} = '{quoted}'", max_results=1)
    return runs[0].info.run_id if runs else None


def build(config: schema.MLflow, run_id: str | None = None) -> MLflowTracker:
    return MLflowTracker(config.uri, config.experiment, config.flush_seconds, run_id)
