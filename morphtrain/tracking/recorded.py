"""Where the runs in a directory were recorded, and whether MLflow's store is there. Nothing is made or changed."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

from morphtrain.addresses import shown
from morphtrain.errors import UserError
from morphtrain.schema.tracking import VARIABLE
from morphtrain.tracking.store import DATABASE, SQLITE, database_file, tracking_uri


def recorded(directory: Path) -> str:
    """The address of the SQLite store that a run recorded to, or the first one found of a sweep or an experiment.

    Its files say where it was started and with which `tracking.uri`. They do not decide that another place than a file
    of this machine is looked at: the directory may be somebody else's.

    Raises:
        UserError: if there is no run, or it recorded to no such store.
    """
    if (saved := next(directory.rglob(".hydra/hydra.yaml"), None)) is None:
        raise UserError(f"{directory}: no run is there; a run leaves its directory in outputs/ or multirun/")
    run, config = saved.parents[1], saved.with_name("config.yaml")
    if _text(config, "tracking", "name") == "none":
        raise UserError(f"{run}: recorded nothing (tracking=none)")
    uri = _text(config, "tracking", "uri")
    started = _text(saved, "hydra", "runtime", "cwd")
    if uri is None and os.environ.get(VARIABLE):
        return tracking_uri(None)  # as the run did, if that was set then
    path = database_file(uri or f"{SQLITE}{DATABASE}")
    if path is None:
        raise UserError(f"{run}: recorded to {shown(uri or '')}; --uri shows another store than a file of this machine")
    if started is None:
        raise UserError(f"{saved}: damaged, it does not say where the run was started")
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


def _text(file: Path, *keys: str) -> str | None:
    """A text in a file that Hydra has written, by its keys; None if it is not there, or is no text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        node: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (ValueError, YAMLError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: damaged, it is no config") from error
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, str) else None
