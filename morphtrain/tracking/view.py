"""A ready view of MLflow's page of runs: which runs it shows, and in which columns.

MLflow's page keeps a saved view as a tag of the experiment, and opens on the one that its address names (read from the
page of MLflow 3.17, which documents neither). Another version that knows no such tag shows its plain table.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from morphtrain import schema
from morphtrain.addresses import shown
from morphtrain.errors import first_line
from morphtrain.tracking import store

TAG = "mlflow.sharedViewState."  # before the key that the address has
ALL = "all"  # the key of the view of all runs
LOCAL = "http://127.0.0.1:5000"  # where `make ui` shows a database
RESULTS = ("val_accuracy", "train_seconds", "macs", "params")
MOST_SETTINGS = 8  # columns; more do not fit on a screen
NO_SETTINGS = ("trial", "resume", "objective", "tracking.", "data.root")  # params that tell no runs apart

log = logging.getLogger(__name__)


def ready_view(uri: str | None, experiment: str, study: str | None = None, objective: Sequence[str] = ()) -> str:
    """Keep a view in the store and return its path below a server's address: `/#/experiments/1/runs?...`.

    The runs of a sweep are below the sweep's own, the newest first. The columns are the results, and what differs
    between the runs of the study.

    Args:
        uri: of the store; None for MLFLOW_TRACKING_URI, or else mlflow.db in the current directory.
        experiment: name of the MLflow experiment; created if it does not exist.
        study: whose runs are shown; None: all runs of the experiment.
        objective: metrics that are shown first.

    Raises:
        Exception: whatever MLflow or the database raises.
    """
    client, experiment_id = store.connect(store.tracking_uri(uri), experiment)
    key = ALL if study is None else hashlib.sha256(study.encode()).hexdigest()[:16]
    runs = [] if study is None else store.runs_tagged(client, experiment_id, "study", study)
    columns = [*_columns("metrics", dict.fromkeys([*objective, *RESULTS])), *_differing(runs)]
    state = {
        "searchFilter": "" if study is None else store.tag_filter("study", study),
        "selectedColumns": columns,
        "columnOrder": columns,
        "runsHiddenMode": "SHOW_ALL",  # in charts, where it would be the first ten
    }
    now = int(time.time() * 1000)
    name = "all runs" if study is None else study
    saved = {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    client.set_experiment_tag(experiment_id, f"{TAG}{key}", json.dumps(saved))
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={key}"


def say_view(uri: str, experiment: str, run_id: str, objective: Sequence[str]) -> None:
    """Log where the study of a sweep's own run is shown, or that no view of it could be kept."""
    try:
        client, _ = store.connect(uri, experiment)
        path = ready_view(uri, experiment, client.get_run(run_id).data.tags["study"], objective)
    except Exception as error:  # noqa: BLE001 (databases and servers fail in too many ways to name)
        log.warning("MLflow (%s): no view of the study: %s", shown(uri), shown(first_line(error)))
        return
    server = store.view(uri)
    log.info("in MLflow: %s", f"{server}{path}" if "://" in server.split()[0] else f"{server}, then {LOCAL}{path}")


def _differing(runs: Iterable[Any]) -> list[str]:
    """The columns of what differs between MLflow's runs: options of groups, and values of params."""
    runs = list(runs)
    groups = [group for group in schema.OPTIONS if _varies(group, [run.data.tags for run in runs])]
    params = [run.data.params for run in runs]
    names = sorted({key for run in params for key in run if not key.startswith(NO_SETTINGS)})
    settings = [key for key in names if not key.endswith(".name") and _varies(key, params)]
    return [*_columns("tags", groups), *_columns("params", settings[:MOST_SETTINGS])]


def _varies(key: str, runs: Sequence[Mapping[str, str]]) -> bool:
    return len({run[key] for run in runs if key in run}) > 1


def _columns(kind: str, keys: Iterable[str]) -> list[str]:
    return [f"{kind}.`{key}`" for key in keys]
