"""The MLflow run of a sweep: the parent of its trials' runs, which get its id as `tracking.parent_run_id`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain import schema
from morphtrain.addresses import shown
from morphtrain.errors import first_line
from morphtrain.tracking import mlflow, store, view
from morphtrain.tracking.unsent import Record

SWEEP_DIR_TAG = "sweep_dir"  # only parent runs have it, no run of a trial

log = logging.getLogger(__name__)


def prepare(config: schema.tracking.Tracking | schema.Custom) -> None:
    """Do what takes seconds before a sweep begins: import MLflow."""
    if isinstance(config, schema.tracking.MLflow):
        store.load_mlflow()


def begin_sweep(
    config: schema.tracking.Tracking | schema.Custom, name: str, tags: Mapping[str, str], sweep_dir: Path
) -> str | None:
    """Create the parent run of a sweep, or find its study's existing one, and return its id.

    This also creates the store's database and experiment if they do not exist, so that the trials need not. Several
    sweeps may begin at once: those of one study get the same run.

    Args:
        config: the config group `tracking`; without MLflow there is no run.
        name: of the run, and of the study unless `tags` has `study`.
        tags: of the run.
        sweep_dir: where the sweep's files are.

    Returns:
        The run's id. None without MLflow, and, with a warning, if the store cannot be reached: then the trials' runs
        have no parent.
    """
    if not isinstance(config, schema.tracking.MLflow):
        return None
    uri = store.tracking_uri(config.uri)
    tags = {"study": name, **tags, SWEEP_DIR_TAG: str(sweep_dir)}
    try:
        client, experiment_id = store.connect(uri, config.experiment)
        with store.alone(uri):
            return _parent(client, experiment_id, name, tags)
    except Exception as error:  # noqa: BLE001 (databases and servers fail in too many ways to name)
        reason = shown(first_line(error))
        log.warning("MLflow (%s): no parent run for the sweep, which goes on without one: %s", shown(uri), reason)
        return None


def end_sweep(
    config: schema.tracking.MLflow,
    run_id: str,
    metrics: Mapping[str, float],
    params: Mapping[str, Any],
    artifacts: Sequence[Path],
    status: str,
    sweep_dir: Path | None = None,
) -> None:
    """End the parent run `run_id` as FINISHED, FAILED or KILLED, with the results of the sweep, and say where to look.

    Args:
        config: the config group `tracking`, the same as for `begin_sweep`.
        metrics: results of the sweep; a resumed sweep adds another value to each.
        params: new ones are added; existing ones keep their values, since MLflow refuses to change them.
        artifacts: files to upload.
        sweep_dir: where `unsent.json` goes, for `python -m morphtrain.tracking`, if the store cannot be reached; None:
            nowhere.
    """
    tracker = mlflow.MLflowTracker(config.uri, config.experiment, run_id=run_id)
    now = time.time()
    texts = {key: str(value) for key, value in params.items()}
    files: list[tuple[str, str | None]] = [(str(path), None) for path in artifacts]
    record = Record(tracker.uri, config.experiment, run_id, texts, {}, int(now * 1000), artifacts=files, run_id=run_id)
    tracker.begin(record, sweep_dir, resumed=True)
    tracker.finish(status, [{"epoch": 1, "timestamp": now, **metrics}])
    if status == "FINISHED" and tracker.client is not None:
        view.say_view(tracker.uri, config.experiment, run_id, params.get("objective", ()), sweep_dir)


def _parent(client: Any, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
    """The id of the parent run of study `tags["study"]`, found or created, with status RUNNING."""
    from mlflow.entities import RunTag

    found = _parents(client, experiment_id, tags["study"])
    if found:
        client.update_run(found[0], status="RUNNING")
        client.log_batch(found[0], tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)
        return found[0]
    mine = client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id
    first = _parents(client, experiment_id, tags["study"])[0]
    if first != mine:  # a sweep on another machine created one between the two queries
        client.delete_run(mine)
    return first


def _parents(client: Any, experiment_id: str, study: str) -> list[str]:
    """Ids of the study's parent runs, oldest first."""
    runs = store.runs_tagged(client, experiment_id, "study", study)
    return [run.info.run_id for run in runs if SWEEP_DIR_TAG in run.data.tags]
