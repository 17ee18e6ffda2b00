"""Runs for TensorBoard: event files in the run directory, read by `tensorboard --logdir`.

They are written with TensorBoard's own package, which torch's SummaryWriter wraps: without its thread, so that what
fails is raised here, and without torch.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from morphtrain import schema
from morphtrain.tracker import IN_EVERY_RECORD, Tracker
from morphtrain.tracking.store import from_home
from morphtrain.tracking.tolerant import Tolerant

FOLDER = "tensorboard"
NAME_LENGTH = 100  # of the folder that TensorBoard shows as the name of the run
PNG_SIZE = slice(16, 24)  # width and height, in the header of every PNG


class TensorBoardTracker(Tracker):
    """Writes every metric once per epoch (step = epoch), config and tags as text and hyperparameters, and pictures.

    The files are in `tensorboard/<name of the run>` of the run directory, so that TensorBoard shows a sweep's directory
    as its trials. A run that goes on there adds the epochs that are missing. Other files stay where they are.
    """

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None  # None: not open, or no longer sound
        self.sent_epoch = 0

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Begin event files in `run_dir`, or go on with those that are there."""
        self.params, self.tags, self.run_dir = params, tags, run_dir
        self.folder = _folder(run_dir / FOLDER, tags.get("name", "run"))
        self.update(history)

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write the epochs that the files lack; they are in the file when this returns."""
        if self.file is None:
            self._open(len(history))
        self._write(*(_scalars(record) for record in history if record["epoch"] > self.sent_epoch))
        self.sent_epoch = len(history)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Write a picture; any other file is in the run directory already."""
        if path.suffix == ".png":
            if self.file is None:
                self._open(self.sent_epoch)
            self._write(_picture(path, self.sent_epoch))

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        """Write what is left, and close the file."""
        self.update(history)
        assert self.file is not None
        self.file.close()
        self.file = None

    def view(self) -> str:
        """The command that shows this run and those beside it."""
        return f"tensorboard --logdir {shlex.quote(str(from_home(self.run_dir.absolute().parent)))}"

    def _open(self, epochs: int) -> None:
        """Begin a file that goes on after the epochs that those before it hold, of the first `epochs` of the run."""
        from tensorboard.compat.proto import event_pb2

        self.folder.mkdir(parents=True, exist_ok=True)
        recorded = _last_epoch(self.folder)
        self.sent_epoch = min(recorded, epochs)
        # Files are read in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self.file = (self.folder / name).open("xb")
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard then forgets later epochs, which a damaged checkpoint has taken back. It ignores the first one.
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=time.time(), step=self.sent_epoch + 1, session_log=restart))
        if not recorded:
            self._write(*_about(self.params, self.tags))

    def _write(self, *events: Any) -> None:
        """Append events to the file; after a failure none follow in it, since they could not be read."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        file, self.file = self.file, None
        assert file is not None
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
        writer.flush()
        self.file = file


def _folder(parent: Path, name: str) -> Path:
    """The folder of the run's event files: the one that is there, or else one with its name."""
    present = sorted(path for path in parent.glob("*") if path.is_dir() and not path.is_symlink())
    plain = re.sub(r"[/\\\x00-\x1f]", "_", name)[:NAME_LENGTH].strip(" .")
    return present[0] if present else parent / (plain or "run")


def _last_epoch(folder: Path) -> int:
    """The last epoch in a folder's event files, 0 without any; what is half-written there is passed over."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return 0
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto import event_pb2

    last = 0
    for event in (event for file in files for event in EventFileLoader(str(file)).Load()):
        if event.session_log.status == event_pb2.SessionLog.START:
            last = min(last, event.step - 1)
        elif any(value.tag == IN_EVERY_RECORD for value in event.summary.value):
            last = event.step
    return int(last)


def _scalars(record: Mapping[str, float]) -> Any:
    """The event of an epoch: one for all metrics, so that the file holds all of them or none."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    summary = summary_pb2.Summary()
    for key, value in record.items():
        if key not in ("epoch", "timestamp"):
            summary.MergeFrom(scalar_pb(key, value))
    return event_pb2.Event(wall_time=record["timestamp"], step=int(record["epoch"]), summary=summary)


def _about(params: Mapping[str, Any], tags: Mapping[str, str]) -> list[Any]:
    """The events that say what run this is."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.text.summary_v2 import text_pb

    plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in params.items()}
    summaries = [text_pb("config", _as_text(params)), text_pb("tags", _as_text(tags)), hparams_pb(plain)]
    return [event_pb2.Event(wall_time=time.time(), summary=summary) for summary in summaries]


def _as_text(values: Mapping[str, Any]) -> str:
    """Keys and values as Markdown shows them unchanged."""
    return "\n".join(f"    {key}: {value}" for key, value in values.items())


def _picture(path: Path, step: int) -> Any:
    from tensorboard.compat.proto import event_pb2, summary_pb2

    content = path.read_bytes()
    width, height = struct.unpack(">II", content[PNG_SIZE])
    image = summary_pb2.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
    summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=path.stem, image=image)])
    return event_pb2.Event(wall_time=time.time(), step=step, summary=summary)


def build(config: schema.tracking.TensorBoard, run_id: str | None = None) -> Tolerant:
    """The tracker of the config group `tracking`."""
    return Tolerant("tensorboard", TensorBoardTracker())
