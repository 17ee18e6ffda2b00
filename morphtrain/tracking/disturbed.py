"""Attempts at a run that others have disturbed: they have ended and stay in MLflow, but nothing is to count them."""

from __future__ import annotations

import logging
from pathlib import Path

from morphtrain import schema
from morphtrain.addresses import shown
from morphtrain.errors import first_line
from morphtrain.tracking import store
from morphtrain.tracking.mlflow import RUN_DIR_TAG

TAG = "disturbed"

log = logging.getLogger(__name__)


def mark_disturbed(config: schema.tracking.Tracking | schema.Custom | None, run_dir: Path) -> None:
    """Tag all runs of a directory as disturbed; without MLflow nothing happens, and a store that is away is warned of.

    Args:
        config: the config group `tracking`.
        run_dir: of the run, as it was trained in.
    """
    if not isinstance(config, schema.tracking.MLflow):
        return
    uri = store.tracking_uri(config.uri)
    try:
        client, experiment_id = store.connect(uri, config.experiment)
        for run in store.runs_tagged(client, experiment_id, RUN_DIR_TAG, str(run_dir)):
            client.set_tag(run.info.run_id, TAG, "true")
    except Exception as error:  # noqa: BLE001 (databases and servers fail in too many ways to name)
        reason = shown(first_line(error))
        log.warning("MLflow (%s): %s was disturbed, which it does not say: %s", shown(uri), run_dir, reason)
