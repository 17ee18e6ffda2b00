"""Runs in MLflow: buffered, sent between epochs, and never a reason for training to stop."""

from __future__ import annotations

import contextlib
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
SQLITE = "sqlite:///"
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

        _create_database(self.uri)
        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(self.experiment)
        run = _find_run(client, experiment_id, self.run_id, tags[RUN_DIR_TAG]) if resumed else None
        if run is None:
            name = " ".join(tags[key] for key in ("model", "prune", "precision"))
            run = client.create_run(experiment_id, tags=dict(tags), run_name=f"{name} seed {tags['seed']}")
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            recorded = client.get_metric_history(run.info.run_id, "epoch_seconds")
            self.sent_epoch = max((metric.step for metric in recorded), default=0)
        # A resumed run keeps the params it has: MLflow refuses to change them, `resume` itself for one.
        fresh = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        client.log_batch(run.info.run_id, params=fresh)
        self.run_id = run.info.run_id
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


def _create_database(uri: str) -> None:
    """Make a SQLite store under another name and link it to its own: killed half way, it would be of no use."""
    from mlflow.tracking import MlflowClient

    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        MlflowClient(tracking_uri=f"{SQLITE}{fresh}").search_experiments()
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _find_run(client: Any, experiment_id: str, run_id: str | None, run_dir: str) -> Any:
    """The MLflow run of a checkpoint; without one, the run that was killed in `run_dir` before its first checkpoint."""
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # the checkpoint was written with another tracking store
    quoted = run_dir.replace("\\", "\\\\").replace("'", "\\'")
    runs = client.search_runs([experiment_id], f"tags.{RUN_DIR_TAG} = '{quoted}'")
    return next((run for run in runs if not run.data.metrics), None)


def build(config: schema.MLflow, run_id: str | None = None) -> MLflowTracker:
    return MLflowTracker(config.uri, config.experiment, config.flush_seconds, run_id)
