"""A ready view of MLflow's page of runs: which runs it shows, and in which columns.

MLflow's page keeps a saved view as a tag of the experiment, and opens on the one that its address names (read from the
page of MLflow 3.17, which documents neither). Another version that knows no such tag shows its plain table.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain import schema
from morphtrain.addresses import shown
from morphtrain.errors import first_line
from morphtrain.tracking import store
from morphtrain.tracking.mlflow import RUN_DIR_TAG
from morphtrain.tracking.recorded import Recorded
from morphtrain.wording import command_name

TAG = "mlflow.sharedViewState."  # before the key that the address has
ALL = "all"  # the key of the view of all runs
PLAIN = "/"  # the path of MLflow's page without a view
NO_STUDY = "none"  # as the tag `study` says it
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


def page_of(recorded: Recorded) -> str:
    """The path of the page that is best for a run: `ready_view` of its study, or MLflow's own if it is in none.

    Where the store does not have the run, nothing is made.

    Raises:
        Exception: whatever MLflow or the database raises.
    """
    store.load_mlflow()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=recorded.uri)
    found = client.get_experiment_by_name(recorded.experiment)
    runs = [] if found is None else store.runs_tagged(client, found.experiment_id, RUN_DIR_TAG, recorded.run_dir)
    study = runs[-1].data.tags.get("study", NO_STUDY) if runs else NO_STUDY
    return PLAIN if study == NO_STUDY else ready_view(recorded.uri, recorded.experiment, study, recorded.objective)


def say_view(uri: str, experiment: str, run_id: str, objective: Sequence[str], sweep_dir: Path | None) -> None:
    """Log what shows the study of a sweep's own run, or that no view of it could be kept.

    A server is shown by its address, a database by the command that serves it: from `sweep_dir`, it opens on the view.
    """
    try:
        client, _ = store.connect(uri, experiment)
        path = ready_view(uri, experiment, client.get_run(run_id).data.tags["study"], objective)
    except Exception as error:  # noqa: BLE001 (databases and servers fail in too many ways to name)
        log.warning("MLflow (%s): no view of the study: %s", shown(uri), shown(first_line(error)))
        return
    if uri.startswith(store.SERVERS):
        log.info("in MLflow: %s%s", store.view(uri).rstrip("/"), path)
    elif sweep_dir is not None and (store.database_file(uri) is not None or uri == store.tracking_uri(None)):
        log.info("in MLflow: %s %s", command_name("ui"), shlex.quote(str(store.from_home(sweep_dir))))
    else:
        log.info("in MLflow: %s, and there %s", store.view(uri), path)


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
