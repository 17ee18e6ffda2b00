"""Runs in Weights & Biases, online or as files that `wandb sync` sends later."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain import schema
from morphtrain.tracker import Tracker
from morphtrain.tracking.store import from_home
from morphtrain.tracking.tolerant import Tolerant

# By default wandb reports its own errors to its makers, prints, and asks for a key on a terminal, for which a run would
# wait. The user's own settings win.
ENVIRONMENT = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
SERVICE = "WANDB_SERVICE"  # by which a process finds a service of wandb's that runs already
# Not what the console shows, nor code, differences to git, packages and the machine: tags say what matters of these.
# Nor does it watch the processor while training is timed.
SETTINGS: Mapping[str, Any] = {
    **{"console": "off", "silent": True, "disable_git": True, "disable_code": True, "save_code": False},
    **{"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False},
    **{"init_timeout": 10.0, "login_timeout": 10.0, "finish_timeout": 60.0, "finish_timeout_raises": True},  # seconds
    "x_transaction_log_flush_interval": 1.0,  # seconds
}
RUN_ID = re.compile(r"[\w-]{1,64}")
NAME_LENGTH, TAG_LENGTH = 128, 64  # of a run or group, and of a tag, in wandb


class WandbTracker(Tracker):
    """Sends config, tags, every metric once per epoch (step = epoch), and files to one run.

    Online, a run that goes on continues the same run after the epochs that the server has. Offline nobody can say what
    it has: the new directory holds all epochs, under the same id, and takes the place of the one before.

    Args:
        mode: online, offline or disabled; None: as WANDB_MODE says, else online.
        project: of the run.
        entity: user or team; None: the default one.
        run_id: of the run to continue; None for a new one.
    """

    def __init__(self, mode: str | None, project: str, entity: str | None = None, run_id: str | None = None) -> None:
        self.mode: Any = mode or schema.tracking.wandb_mode()
        self.project, self.entity = project, entity
        self.run_id = run_id if run_id is not None and RUN_ID.fullmatch(run_id) else None
        self.run: Any = None
        self.owns_service = False  # whether ending the run ends wandb's own process, too
        self.sent_epoch = 0

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Begin a run, or continue the one of `run_id`, whose files are below `run_dir`."""
        self.run_dir = run_dir
        if self.run is None:
            try:
                self._begin(params, tags)
            except Exception:
                self._end_service()
                raise
        self.update(history)
        if self.mode == "offline":
            self._remove_superseded()

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        """Hand wandb the epochs that it lacks; its own process sends them."""
        for record in history[self.sent_epoch :]:
            epoch = int(record["epoch"])
            metrics = {key: value for key, value in record.items() if key not in ("epoch", "timestamp")}
            self.run.log(metrics, step=epoch, commit=True)
            self.sent_epoch = epoch

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep the file among those of the run, under its place in the run directory."""
        below = path.is_relative_to(self.run_dir)
        self.run.save(glob.escape(str(path)), base_path=str(self.run_dir if below else path.parent), policy="now")

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        """Hand over what is left, and end the run; it fails in wandb unless it is FINISHED."""
        try:
            self.update(history)
            self.run.finish(exit_code=0 if status == "FINISHED" else 1)
        finally:
            self.run = None
            self._end_service()

    def view(self) -> str:
        """The command that sends an offline run, or the address of an online one."""
        if self.mode == "offline":
            return f"wandb sync {shlex.quote(str(from_home(self.directory)))}"
        return self.address

    def _begin(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        self.owns_service = SERVICE not in os.environ
        self.run_id = self.run_id or secrets.token_hex(8)
        with _hooks_kept():
            import wandb

            known = {key: value for key, value in SETTINGS.items() if key in wandb.Settings.model_fields}
            study = tags.get("study", "none")
            self.run = wandb.init(
                id=self.run_id,
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                dir=str(self.run_dir),
                name=tags.get("name", self.run_id)[:NAME_LENGTH],
                group=None if study == "none" else study[-NAME_LENGTH:],
                tags=[f"{group}={tags[group]}"[:TAG_LENGTH] for group in schema.OPTIONS if group in tags],
                config={**_nested(params), "tags": dict(tags)},
                allow_val_change=True,  # resuming changes at least `resume`
                resume="allow" if self.mode == "online" else None,
                reinit="create_new",  # a run of the caller's own, if there is one, is left alone
                settings=wandb.Settings(**known),
            )
        self.sent_epoch = max(0, self.run.starting_step - 1) if self.mode == "online" else 0
        self.address = str(self.run.url or "") if self.mode == "online" else ""
        self.directory = Path(self.run.dir).parent  # of the run's own files

    def _end_service(self) -> None:
        """End wandb's own process, if this run has started it: it would live as long as this one."""
        import wandb

        if not self.owns_service:
            return
        try:
            wandb.teardown()
        except SystemExit as error:
            raise RuntimeError(f"wandb's service ended with {error.code}") from error

    def _remove_superseded(self) -> None:
        """Remove what earlier attempts at this run have left offline, all of whose epochs are in the new directory."""
        for place in self.directory.parent.glob(f"offline-run-*-{self.run_id}"):
            if place.name != self.directory.name:
                shutil.rmtree(place)


@contextlib.contextmanager
def _hooks_kept() -> Iterator[None]:
    """Give back what wandb replaces in the process to see how it ends, which the run tells it."""
    kept = {name: getattr(sys, name) for name in ("exit", "excepthook")}
    try:
        yield
    finally:
        for name, hook in kept.items():
            setattr(sys, name, hook)


def _nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nodes, as wandb wants them."""
    nested: dict[str, Any] = {}
    for key, value in params.items():
        *path, name = key.split(".")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    return nested


def build(config: schema.tracking.Wandb, run_id: str | None = None) -> Tolerant:
    """The tracker of the config group `tracking`; `run_id` is the run to continue."""
    return Tolerant("wandb", WandbTracker(config.mode, config.project, config.entity, run_id))
