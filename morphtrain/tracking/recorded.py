"""Where the runs in a directory were recorded, and whether MLflow's store is there. Nothing is made or changed."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphtrain.addresses import shown
from morphtrain.errors import UserError
from morphtrain.schema.tracking import VARIABLE
from morphtrain.tracking.store import DATABASE, SQLITE, database_file, tracking_uri


@dataclass(frozen=True)
class Recorded:
    """Where a run was recorded, and what finds it there.

    Args:
        uri: address of the store.
        experiment: name of the MLflow experiment; "" if the run's files do not say.
        run_dir: its directory as it was then; "" if they do not say.
        objective: its metrics.
    """

    uri: str
    experiment: str
    run_dir: str
    objective: tuple[str, ...]


def recorded(directory: Path) -> Recorded:
    """Where a run was recorded, or one of a sweep or an experiment: a SQLite store.

    Its files say where it was started and with which `tracking.uri`. They do not decide that another place than a file
    of this machine is looked at: the directory may be somebody else's.

    Raises:
        UserError: if there is no run, or it recorded to no such store.
    """
    found = directory.rglob(".hydra/hydra.yaml")
    saved = min(found, key=lambda path: (len(path.parts), path), default=None)  # runs with fresh seeds lie deeper
    if saved is None:
        raise UserError(f"{directory}: no run is there; a run leaves its directory in outputs/ or multirun/")
    run = saved.parents[1]
    config, settings = _read(saved.with_name("config.yaml")), _read(saved)
    tracker = _text(config, "tracking", "name") or _text(config, "tracking", "_target_")
    if tracker != "mlflow":
        raise UserError(f"{run}: recorded nothing in MLflow (tracking={tracker})")
    objective = config.get("objective")
    return Recorded(
        _uri(run, _text(config, "tracking", "uri"), _text(settings, "hydra", "runtime", "cwd")),
        _text(config, "tracking", "experiment") or "",
        _text(settings, "hydra", "runtime", "output_dir") or "",
        tuple(name for name in objective if isinstance(name, str)) if isinstance(objective, list) else (),
    )


def _uri(run: Path, uri: str | None, started: str | None) -> str:
    """The address of the store of a run that was started in the directory `started` with `uri` as `tracking.uri`."""
    if uri is None and os.environ.get(VARIABLE):
        return tracking_uri(None)  # as the run did, if that was set then
    path = database_file(uri or f"{SQLITE}{DATABASE}")
    if path is None:
        raise UserError(f"{run}: recorded to {shown(uri or '')}; --uri shows another store than a file of this machine")
    if started is None:
        raise UserError(f"{run}: damaged, .hydra/hydra.yaml does not say where it was started")
    return f"{SQLITE}{Path(started) / path}"


def check_store(uri: str) -> None:
    """Raise a `UserError` if `uri` is that of a file, and that is missing or no store: MLflow would make it one."""
    path = database_file(uri)
    if path is None:
        return
    if not path.is_file():
        wanted = "a run makes one where it is started; a run's directory or --uri names another"
        raise UserError(f"{path}: nothing has been recorded there; {wanted}")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: {error}") from error
    if not {"experiments", "runs"} <= tables:
        raise UserError(f"{path}: no store of MLflow's")


def _read(file: Path) -> dict[Any, Any]:
    """What a file holds that Hydra has written; interpolations stay as they are."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        node: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (ValueError, YAMLError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: damaged, it is no config") from error
    return node if isinstance(node, dict) else {}


def _text(node: Any, *keys: str) -> str | None:
    """A text by its keys; None if it is not there, or is no text."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, str) else None
