"""Runs in MLflow: buffered, sent between epochs, and never a reason for training to stop.

A store that cannot be reached is tried again, rarely enough that it hardly delays training. What it lacks is kept in a
file of the run directory, which `python -m morphtrain.tracking` sends later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain import schema
from morphtrain.addresses import shown
from morphtrain.errors import first_line
from morphtrain.tracker import IN_EVERY_RECORD, Tracker
from morphtrain.tracking import store, unsent
from morphtrain.tracking.pace import SHARE, Pace
from morphtrain.tracking.unsent import Record
from morphtrain.wording import command_name

BATCH = 900  # metrics per call; MLflow accepts 1000
NAME_LENGTH = 250  # of a run's name, in MLflow's database
RUN_DIR_TAG = "run_dir"
PARENT_TAG = "mlflow.parentRunId"

log = logging.getLogger(__name__)


class MLflowTracker(Tracker):
    """Sends params, tags, every metric once per epoch, and files to one MLflow run.

    Args:
        uri: tracking store; None for MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in the current directory.
        experiment: name of the MLflow experiment; created if it does not exist.
        flush_seconds: least time between two sendings of metrics.
        run_id: the MLflow run to continue; None for a new one.
        parent_run_id: the MLflow run of the sweep that this one belongs to.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        flush_seconds: float = 10.0,
        run_id: str | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        self.uri = store.tracking_uri(uri)
        self.experiment = experiment
        self.flush_seconds = flush_seconds
        self.run_id = run_id
        self.parent_run_id = parent_run_id
        self.resumed = False
        self.sent_epoch = 0  # the last epoch MLflow has
        self.last_flush = time.monotonic()
        self.client: Any = None  # None: not connected yet, or no longer
        # Each has its share of the time.
        self.paces = {"values": Pace(SHARE), "files": Pace(SHARE)}
        store.load_mlflow()  # now, so that the seconds it takes do not count as part of an attempt

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Create the MLflow run or, if `resumed`, continue the one that `run_dir` and `history` belong to."""
        tags = dict(tags)
        name = tags.pop("name", f"seed {tags['seed']}")[:NAME_LENGTH]
        parent = {PARENT_TAG: self.parent_run_id} if self.parent_run_id else {}
        self.begin(
            Record(
                self.uri,
                self.experiment,
                name,
                {key: str(value) for key, value in params.items()},
                {**tags, RUN_DIR_TAG: str(run_dir), **parent},
                started=_now(),
                history=[dict(record) for record in history],
            ),
            run_dir,
            resumed,
        )
        self.sync()

    def begin(self, record: Record, run_dir: Path | None, resumed: bool) -> None:
        """Set what the store should have; whatever cannot be sent is written to `run_dir` (None: nowhere)."""
        self.run, self.run_dir, self.resumed = record, run_dir, resumed

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        """Send the epochs that MLflow does not have, unless the last attempt was less than `flush_seconds` ago."""
        if time.monotonic() - self.last_flush >= self.flush_seconds:
            self.run.history = [dict(record) for record in history]
            self.sync()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file now or, if that fails, with later values."""
        entry = (str(path), folder)
        if entry not in self.run.artifacts:
            self.run.artifacts.append(entry)
        if self.client is not None:
            self._attempt("files", self._send_files)

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        """Send what is left and end the run as FINISHED, FAILED or KILLED; warn if the store does not have it all."""
        self.run.history = [dict(record) for record in history]
        self.run.status, self.run.ended = status, _now()
        if status == "KILLED" and self.paces["values"].failing:
            sent = self.sync()  # nobody who has stopped a run waits for a server that is away
        else:
            # Try twice: the first attempt may fail on a connection that a restarted server has closed.
            sent = self.sync(patient=False) or self.sync(patient=False)
        if not sent and self.run_dir is not None:
            where = "" if self.uri == store.tracking_uri(None) else f" --uri {shown(self.uri)}"
            log.warning(
                "MLflow (%s) lacks part of this run; to send it later: %s %s%s",
                shown(self.uri),
                command_name("tracking"),
                self.run_dir,
                where,
            )

    def view(self) -> str:
        """What shows the store, see `store.view`; "" if the run is not in it."""
        return store.view(self.uri) if self.run_id else ""

    def sync(self, patient: bool = True) -> bool:
        """Send what the store lacks, and keep in the run directory what it does not accept; True if it has everything.

        After a failure, `patient` skips attempts until the next one is due; otherwise an attempt is made now.
        """
        self.last_flush = time.monotonic()
        sent = self._attempt("values", self._send_values, patient) and self._attempt("files", self._send_files, patient)
        if self.run_dir is not None:
            try:
                unsent.remove(self.run_dir) if sent else unsent.write(self.run, self.run_dir)
            except OSError as error:
                log.warning("%s: cannot keep what MLflow lacks: %s", self.run_dir / unsent.FILE, error.strerror)
        return sent

    def _send_values(self) -> None:
        """Send everything except files, which may go to another server and fail for other reasons."""
        if self.client is None:
            self._connect()
        elif store.database_file(self.uri) is None:
            store.probe(self.uri)  # a server may have gone since
        if self.run.history:
            self._send(self.run.history)
        if self.run.status != "RUNNING":
            self.client.set_terminated(self.run_id, self.run.status, self.run.ended)

    def _connect(self) -> None:
        """Connect to the store, find or create the run, and ask which epochs it has: only the answers may be lost."""
        from mlflow.entities import Param, RunTag

        client, experiment_id = store.connect(self.uri, self.experiment)
        run = self._find_run(client, experiment_id)
        if run is None:
            run = client.create_run(experiment_id, self.run.started, self.run.tags, self.run.name)
        elif self.run.status == "RUNNING" != run.info.status:
            client.update_run(run.info.run_id, status="RUNNING")
        # Existing params stay: MLflow refuses to change them, and resuming changes at least `resume`.
        params = [Param(key, value) for key, value in self.run.params.items() if key not in run.data.params]
        tags = [RunTag(key, value) for key, value in self.run.tags.items() if key not in run.data.tags]
        client.log_batch(run.info.run_id, params=params, tags=tags, synchronous=True)
        recorded = client.get_metric_history(run.info.run_id, IN_EVERY_RECORD)
        self.sent_epoch = max((metric.step for metric in recorded), default=0)
        self.run_id = self.run.run_id = run.info.run_id
        self.client = client

    def _find_run(self, client: Any, experiment_id: str) -> Any:
        """The MLflow run that the checkpoint names or, if that is unknown, one that was created for this directory."""
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                return client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise  # otherwise the checkpoint belongs to another tracking store, or this one was emptied
        if RUN_DIR_TAG not in self.run.tags:
            return None
        runs = store.runs_tagged(client, experiment_id, RUN_DIR_TAG, self.run.tags[RUN_DIR_TAG])
        return next((run for run in runs if self._is_ours(client, run)), None)

    def _is_ours(self, client: Any, run: Any) -> bool:
        """Whether an MLflow run of this directory is this run: created by a call whose answer was lost, or resumed."""
        if run.info.start_time == self.run.started:
            return True
        if not self.resumed:
            return False
        ours = {(int(record["epoch"]), _milliseconds(record)) for record in self.run.history}
        recorded = client.get_metric_history(run.info.run_id, IN_EVERY_RECORD)
        return not recorded or any((metric.step, metric.timestamp) in ours for metric in recorded)

    def _send(self, history: Sequence[Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

        left = [record for record in history if record["epoch"] > self.sent_epoch]
        while left:
            epochs = left[: max(1, BATCH // len(left[0]))]
            metrics = [
                Metric(key, value, _milliseconds(record), int(record["epoch"]))
                for record in epochs
                for key, value in record.items()
                if key not in ("epoch", "timestamp")
            ]
            self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)
            self.sent_epoch = int(epochs[-1]["epoch"])
            left = left[len(epochs) :]

    def _send_files(self) -> None:
        waiting = self.run.artifacts
        while waiting:
            path, folder = waiting[0]
            if Path(path).exists():
                waiting.append(waiting.pop(0))  # if it fails, the others come first next time
                self.client.log_artifact(self.run_id, path, folder)
                waiting.pop()
            else:
                log.warning("%s no longer exists and was not sent to MLflow", path)
                waiting.pop(0)

    def _attempt(self, what: str, action: Callable[[], Any], patient: bool = True) -> bool:
        """Run `action` if it is due; a failure is logged and training goes on, whatever MLflow raised."""
        pace = self.paces[what]
        if patient and not pace.due:
            return False
        before = time.monotonic()
        try:
            action()
        except Exception as error:  # noqa: BLE001 (databases, servers and disks fail in too many ways to name)
            self._failed(what, error, pace, time.monotonic() - before)
            return False
        if pace.failing:
            log.info("MLflow (%s): missing %s sent", shown(self.uri), what)
        pace.succeeded()
        return True

    def _failed(self, what: str, error: Exception, pace: Pace, seconds: float) -> None:
        if not pace.failing:  # warn once per outage
            reason = shown(first_line(error))
            action = f"sending {what}" if self.run_id else "starting the run"
            goes_on = ", training goes on" if self.run.status == "RUNNING" else ""
            log.warning("MLflow (%s): %s failed%s: %s", shown(self.uri), action, goes_on, reason)
        self.client = None
        pace.failed(seconds)


def _now() -> int:
    return int(time.time() * 1000)


def _milliseconds(record: Mapping[str, float]) -> int:
    return int(record["timestamp"] * 1000)


def build(config: schema.tracking.MLflow, run_id: str | None = None) -> MLflowTracker:
    """The tracker of the config group `tracking`; `run_id` is the MLflow run to continue."""
    return MLflowTracker(config.uri, config.experiment, config.flush_seconds, run_id, config.parent_run_id)
