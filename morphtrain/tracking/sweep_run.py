"""The MLflow run of a sweep: the parent of its trials' runs, in which their ids are `tracking.parent_run_id`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain import schema
from morphtrain.errors import first_line
from morphtrain.tracking import mlflow, store
from morphtrain.tracking.unsent import Record

SWEEP_DIR_TAG = "sweep_dir"  # which no run of a trial has

log = logging.getLogger(__name__)


def begin_sweep(
    config: schema.tracking.Tracking | schema.Custom, name: str, tags: Mapping[str, str], sweep_dir: Path
) -> str | None:
    """Make the parent run of a sweep, or find the one of its study again, and return its id.

    The store's database and experiment are made too, if they are not there, once for all trials to come. Several sweeps
    may begin at once: those of one study get the same run.

    Args:
        config: the config group `tracking`; without MLflow there is no run.
        name: of the run, and of the study unless `tags` has `study`.
        tags: of the run.
        sweep_dir: where the sweep's files are.

    Returns:
        None, with a warning, if the store is away: trials do without a parent then.
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
        reason = store.shown(first_line(error))
        log.warning("MLflow (%s): no parent run for the sweep, which goes on: %s", store.shown(uri), reason)
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
    """End the parent run `run_id` as FINISHED, FAILED or KILLED, with what came out of the sweep.

    Args:
        config: the config group `tracking`, as `begin_sweep` had it.
        metrics: get a further value if the sweep was ended before.
        params: those that the run has already stay as they are: MLflow refuses to change them.
        artifacts: files.
        sweep_dir: where `unsent.json` goes, for `python -m morphtrain.tracking`, if the store is away; None: nowhere.
    """
    tracker = mlflow.MLflowTracker(config.uri, config.experiment, run_id=run_id)
    now = time.time()
    texts = {key: str(value) for key, value in params.items()}
    files: list[tuple[str, str | None]] = [(str(path), None) for path in artifacts]
    record = Record(tracker.uri, config.experiment, run_id, texts, {}, int(now * 1000), artifacts=files, run_id=run_id)
    tracker.begin(record, sweep_dir, resumed=True)
    tracker.finish(status, [{"epoch": 1, "timestamp": now, **metrics}])


def _parent(client: Any, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
    """The parent run of study `tags["study"]`, running."""
    from mlflow.entities import RunTag

    found = _parents(client, experiment_id, tags["study"])
    if found:
        client.update_run(found[0], status="RUNNING")
        client.log_batch(found[0], tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)
        return found[0]
    mine = client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id
    first = _parents(client, experiment_id, tags["study"])[0]
    if first != mine:  # a sweep on another machine began between the two questions
        client.delete_run(mine)
    return first


def _parents(client: Any, experiment_id: str, study: str) -> list[str]:
    """Ids of the study's parent runs, the oldest first."""
    runs = store.runs_tagged(client, experiment_id, "study", study)
    return [run.info.run_id for run in runs if SWEEP_DIR_TAG in run.data.tags]
