"""An MLflow tracking store: where it is, how to connect to it, and how to create its database and experiment once."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from morphtrain import interrupts
from morphtrain.addresses import shown
from morphtrain.files import directory_lock, remove_left_over
from morphtrain.wording import command_name

# By default MLflow sends telemetry and waits minutes for a server that is down. Retrying is left to the caller, who
# knows what it may cost; MLflow would also repeat the request that creates a run. The user's own settings win.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
PROBE_SECONDS = 2  # for a server's first answer, so that one that hangs is detected before anything is sent
DATABASES = ("postgresql", "mysql", "mssql", "sqlite")  # what MLflow takes
# What limits the time for a database's first answer, by driver.
CONNECT_LIMITS = {
    "psycopg": ("connect_timeout",),
    "psycopg2": ("connect_timeout",),
    "pg8000": ("timeout",),
    "pymysql": ("connect_timeout", "read_timeout"),
    "mysqldb": ("connect_timeout",),
    "mysqlconnector": ("connection_timeout",),
    "pyodbc": ("timeout",),
    "pymssql": ("login_timeout",),
    "pysqlite": ("timeout",),
}
SQLITE = "sqlite:///"
DATABASE = "mlflow.db"  # in the directory that the user started from
SERVERS = ("http://", "https://")


def tracking_uri(uri: str | None) -> str:
    """`uri`, else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db; file paths are made absolute, from `home`."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{DATABASE}"
    path = database_file(uri)
    return uri if path is None else f"{SQLITE}{home() / path}"


def home() -> Path:
    """The directory that the user started from, which is not the current one with hydra.job.chdir=true."""
    return Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()


def from_home(path: Path) -> Path:
    """The path relative to the directory that the user started from, if it lies below it."""
    return path.relative_to(home()) if path.is_relative_to(home()) else path


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def view(uri: str) -> str:
    """What shows the store: a server's address, or the command that starts MLflow's UI on it."""
    if uri.startswith(SERVERS):
        return shown(uri)
    found_by_itself = uri == tracking_uri(None)
    return command_name("ui") if found_by_itself else f"{command_name('ui')} --uri {shlex.quote(shown(uri))}"


def load_mlflow() -> None:
    """Import MLflow, which takes seconds, with the settings above and without its routine log messages."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs every migration
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs tracebacks of errors it also raises
    import mlflow.tracking  # noqa: F401


def connect(uri: str, experiment: str) -> tuple[Any, str]:
    """A client of the store and the id of the experiment of that name; both are created if they do not exist.

    Several processes may call this at once.

    Raises:
        Exception: whatever MLflow or the database raises, also if a server does not answer within `PROBE_SECONDS`.
    """
    load_mlflow()
    from mlflow.tracking import MlflowClient

    with _at_home():  # MLflow puts the files of runs below the current directory
        _make_database(uri)
        probe(uri)
        client = MlflowClient(tracking_uri=uri)
        with _answer_within(PROBE_SECONDS):
            found = client.get_experiment_by_name(experiment)
        return client, found.experiment_id if found else _make_experiment(client, experiment)


def probe(uri: str) -> None:
    """Let a database that is away or no database say so: MLflow would ask ten times, for minutes.

    Raises:
        Exception: whatever its driver raises, after `PROBE_SECONDS` if it hangs.
    """
    if uri.partition("://")[0].partition("+")[0] not in DATABASES:
        return
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    engine = create_engine(uri, poolclass=NullPool)
    limits = set(CONNECT_LIMITS.get(engine.driver, ())) - set(engine.url.query)
    engine = create_engine(uri, poolclass=NullPool, connect_args=dict.fromkeys(limits, PROBE_SECONDS))
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA schema_version" if uri.startswith(SQLITE) else "SELECT 1")


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Let one process at a time create what a SQLite store lacks; for a server this does nothing.

    The lock is on the directory, so it leaves no file and ends with the process.
    """
    path = database_file(uri)
    if path is None:
        yield
        return
    with directory_lock(path.parent):
        yield


def tag_filter(key: str, value: str) -> str:
    """What finds the runs whose tag `key` is `value`, and perhaps a few others.

    MLflow's search language cannot escape quotes and backslashes: there is a wildcard in their place.
    """
    pattern = re.sub(r"['\"\\]", "_", value)
    return f"tags.{key} = '{value}'" if pattern == value else f"tags.{key} LIKE '{pattern}'"


def runs_tagged(client: Any, experiment_id: str, key: str, value: str) -> list[Any]:
    """The runs of the experiment whose tag `key` is `value`, oldest first."""
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    runs = client.search_runs([experiment_id], tag_filter(key, value), order_by=order)
    return [run for run in runs if run.data.tags[key] == value]


@contextlib.contextmanager
def _at_home() -> Iterator[None]:
    before = os.getcwd()
    os.chdir(home())
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _answer_within(seconds: int) -> Iterator[None]:
    """Limit how long MLflow waits for an answer, unless the user has set a limit."""
    before = os.environ[TIMEOUT]
    if before == ENVIRONMENT[TIMEOUT]:
        os.environ[TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def _make_database(uri: str) -> None:
    """Create a SQLite store under a temporary name and then link it: one left half made would be unusable."""
    from mlflow.tracking import MlflowClient

    path = database_file(uri)
    if path is None or path.exists():
        return
    with interrupts.at_once(), alone(uri):  # nothing is recorded yet, and MLflow takes seconds
        if path.exists():  # another process was faster
            return
        remove_left_over(path.parent, f"{path.name}.")
        fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            fresh.touch()  # where nothing can be made MLflow would try for minutes
            MlflowClient(tracking_uri=f"{SQLITE}{fresh}").search_experiments()
            with contextlib.suppress(FileExistsError):  # made by a process that ignores the lock (`mlflow ui`)
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
