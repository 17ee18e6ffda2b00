"""Runs as an MLflow store has them, for those who read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from morphtrain.addresses import shown
from morphtrain.errors import UserError, first_line
from morphtrain.tracking import disturbed, store
from morphtrain.tracking.sweep_run import SWEEP_DIR_TAG

PAGE = 1000  # runs a request


@dataclass(frozen=True)
class StoredRun:
    """A run of a store; `history` has a record for each epoch, with the names of `records.jsonl`."""

    run_id: str
    status: str  # FINISHED, KILLED, FAILED or RUNNING
    params: Mapping[str, str]
    tags: Mapping[str, str]
    history: Sequence[Mapping[str, float]]


def read(uri: str, experiment: str, study: str | None = None) -> list[StoredRun]:
    """The runs of an MLflow experiment that trained an epoch, oldest first; with `study`, those with this tag only.

    Nothing is created or changed. The runs of sweeps themselves, which train nothing, are left out, and so are attempts
    that were disturbed and repeated.

    Raises:
        UserError: for a store that cannot be reached, has no such experiment, or no such run in it.
    """
    uri = store.tracking_uri(uri)
    path = store.database_file(uri)
    if path is not None and not path.is_file():
        raise UserError(f"{shown(uri)}: no such database")
    try:
        runs = _read(uri, experiment, study)
    except Exception as error:  # databases and servers fail in too many ways to name
        if isinstance(error, UserError):
            raise
        raise UserError(f"{shown(uri)}: cannot be read: {shown(first_line(error))}") from error
    if not runs:
        of_study = "" if study is None else f" of study {study!r}"
        raise UserError(f"{shown(uri)}: experiment {experiment!r} has no run{of_study} with an epoch")
    return runs


def _read(uri: str, experiment: str, study: str | None) -> list[StoredRun]:
    store.load_mlflow()
    from mlflow.tracking import MlflowClient

    store.probe(uri)
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        known = ", ".join(sorted(each.name for each in client.search_experiments()))
        raise UserError(f"{shown(uri)}: has no experiment {experiment!r}; it has {known}")
    return [
        StoredRun(run.info.run_id, run.info.status, run.data.params, run.data.tags, history)
        for run in _runs(client, found.experiment_id)
        if run.data.tags.keys().isdisjoint((SWEEP_DIR_TAG, disturbed.TAG))
        and (study is None or run.data.tags.get("study") == study)
        if (history := _history(client, run))
    ]


def _runs(client: Any, experiment_id: str) -> list[Any]:
    runs: list[Any] = []
    token = None
    while True:
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        page = client.search_runs([experiment_id], max_results=PAGE, order_by=order, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _history(client: Any, run: Any) -> list[dict[str, float]]:
    """The records of a run; a value that was sent twice counts once."""
    by_epoch: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            record = by_epoch.setdefault(metric.step, {"epoch": metric.step, "timestamp": metric.timestamp / 1000})
            record[name] = metric.value
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]
