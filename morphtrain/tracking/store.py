"""An MLflow tracking store: where it is, how one is reached, and how its database and experiment come to be once."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from morphtrain.files import directory_lock

# What MLflow would do by default: report to its makers, and wait minutes for a server that is gone. Trying again is the
# caller's business, who knows what it may cost; MLflow would also send twice what makes a run. A user's settings win.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
PROBE_SECONDS = 2  # for the first answer of a server; one that hangs is found out before anything is sent
SQLITE = "sqlite:///"


def tracking_uri(uri: str | None) -> str:
    """`uri`, MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in the current directory; the path of a file made absolute."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    path = database_file(uri)
    return uri if path is None else f"{SQLITE}{path.absolute()}"


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def shown(text: str) -> str:
    """A text as it may be printed: without the passwords of the URIs in it."""
    return re.sub(r"(://[^/@:\s]*):[^/@\s]*@", r"\1:***@", text)


def load_mlflow() -> None:
    """Import MLflow, which takes seconds, with the settings above and without its accounts of what it does."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # migrations, line by line
    logging.getLogger("mlflow.store.db.utils").setLevel(
        logging.CRITICAL
    )  # and tracebacks of errors that it raises, too
    import mlflow.tracking  # noqa: F401


def connect(uri: str, experiment: str) -> tuple[Any, str]:
    """A client of the store and the id of its experiment of that name; what is missing is made.

    Several processes may do so at once.

    Raises:
        Exception: whatever MLflow, a database or a server that does not answer within `PROBE_SECONDS` raises.
    """
    load_mlflow()
    from mlflow.tracking import MlflowClient

    _make_database(uri)
    client = MlflowClient(tracking_uri=uri)
    with _answer_within(PROBE_SECONDS):
        found = client.get_experiment_by_name(experiment)
    return client, found.experiment_id if found else _make_experiment(client, experiment)


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Let one process at a time make what a SQLite store lacks; for a server this does nothing.

    The lock is on the directory, which leaves no file behind and ends with the process.
    """
    path = database_file(uri)
    if path is None:
        yield
        return
    with directory_lock(path.parent):
        yield


def runs_tagged(client: Any, experiment_id: str, key: str, value: str) -> list[Any]:
    """The runs of the experiment whose tag `key` is `value`, the oldest first.

    MLflow's search language has no way to escape a quote: any character may stand for it there, and is looked at here.
    """
    pattern = re.sub(r"['\"\\]", "_", value)
    comparison = f"= '{value}'" if pattern == value else f"LIKE '{pattern}'"
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    runs = client.search_runs([experiment_id], f"tags.{key} {comparison}", order_by=order)
    return [run for run in runs if run.data.tags[key] == value]


@contextlib.contextmanager
def _answer_within(seconds: int) -> Iterator[None]:
    """Have MLflow wait no longer for an answer, unless the user has said how long."""
    before = os.environ[TIMEOUT]
    if before == ENVIRONMENT[TIMEOUT]:
        os.environ[TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def _make_database(uri: str) -> None:
    """Make a SQLite store under another name and link it to its own: killed half way, it would be of no use."""
    from mlflow.tracking import MlflowClient

    path = database_file(uri)
    if path is None or path.exists():
        return
    with alone(uri):
        if path.exists():  # another process was faster
            return
        fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            MlflowClient(tracking_uri=f"{SQLITE}{fresh}").search_experiments()
            with contextlib.suppress(FileExistsError):  # one that does not know the lock, as `mlflow ui`
                os.link(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


def _make_experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.create_experiment(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.get_experiment_by_name(name).experiment_id)  # another process was faster
