"""TensorBoard, CSV and several trackers at once: every epoch once after any kill, and no failure of one matters."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import SMALL, Command, Kill
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tensorboard.util import tensor_util

import morphtrain
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.tracker import Tracker
from morphtrain.tracking import tensorboard, tolerant
from morphtrain.tracking.csv import CsvTracker
from morphtrain.tracking.several import Several, run_ids
from morphtrain.tracking.tensorboard import TensorBoardTracker
from morphtrain.tracking.tolerant import Tolerant
from morphtrain.trainer import train

QUICK = (*SMALL, "timing.reference=0", "tracking=tensorboard", "tracking.also=[csv]")
TAGS = {"name": "trial 3: resnet8 prune=early model.weights=a/b", "prune": "early", "seed": "1"}
PARAMS = {"optimizer.lr": 0.1, "model.weights": None, "grow.at_epochs": [2, 3], "data.flip": True, "epochs": 3}


def history_of(epochs: int, grown_at: int = 3) -> list[dict[str, float]]:
    """Records of which those from `grown_at` on have a metric more."""
    return [
        {"epoch": e, "timestamp": 1000.5 + e, "val_accuracy": e / 8, "epoch_seconds": 1 / e, "params": 10**6 + e}
        | ({"accelerated_batches": e} if e >= grown_at else {})
        for e in range(1, epochs + 1)
    ]


def shown(directory: Path) -> EventAccumulator:
    """What TensorBoard itself reads from the event files below a directory."""
    (folder,) = (path for path in (directory / tensorboard.FOLDER).iterdir())
    return EventAccumulator(str(folder), size_guidance={TENSORS: 0}).Reload()


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in shown(directory).Tensors(tag)]


def check_history(directory: Path, history: Sequence[Mapping[str, float]]) -> None:
    """TensorBoard shows each value of the history once, and nothing else."""
    keys = {key for record in history for key in record} - {"epoch", "timestamp"}
    for key in keys:
        wanted = [(record["epoch"], record[key]) for record in history if key in record]
        assert scalars(directory, key) == [(epoch, pytest.approx(value)) for epoch, value in wanted], key


def rows(directory: Path) -> list[dict[str, float]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value != ""} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with both leaves."""
    directory = tmp_path_factory.mktemp("tracked")
    train(morphtrain.compose(*QUICK, "epochs=4"), directory, TAGS)
    return directory


def test_tensorboard_shows_every_metric_of_every_epoch(run_dir: Path) -> None:
    history = read_records(run_dir)
    check_history(run_dir, history)
    events = shown(run_dir).Tensors("val_loss")
    assert [event.wall_time for event in events] == [record["timestamp"] for record in history]


def test_tensorboard_shows_what_run_it_is(run_dir: Path) -> None:
    found = shown(run_dir)
    config, tags = (
        tensor_util.make_ndarray(found.Tensors(tag)[0].tensor_proto).item().decode() for tag in ("config", "tags")
    )
    assert "    prune.lasso_ratio: 0.95\n" in config
    assert "    seed: 1\n" in tags
    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["prune.lasso_ratio"].number_value == 0.95
    assert hparams["optimizer.nesterov"].bool_value is True
    assert hparams["model.weights"].string_value == "None"
    (folder,) = (run_dir / tensorboard.FOLDER).iterdir()
    assert folder.name == "trial 3: resnet8 prune=early model.weights=a_b"


def test_tensorboard_shows_the_pictures_that_the_run_left(run_dir: Path) -> None:
    for name in ("run", "widths"):
        (image,) = shown(run_dir).Tensors(name)
        width, height, png = tensor_util.make_ndarray(image.tensor_proto)
        assert png == (run_dir / f"{name}.png").read_bytes()
        with Image.open(run_dir / f"{name}.png") as picture:
            assert (int(width), int(height)) == picture.size


def test_csv_has_what_the_records_have(run_dir: Path) -> None:
    assert rows(run_dir) == read_records(run_dir)


def started(directory: Path, history: Sequence[Mapping[str, float]] = ()) -> TensorBoardTracker:
    tracker = TensorBoardTracker()
    tracker.start(PARAMS, TAGS, directory, resumed=True, history=history)
    return tracker


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tensorboard_has_every_epoch_once_after_any_kills(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Killed after any epoch, and at any byte of what it wrote last; perhaps the checkpoint before had to be taken."""
    directory = tmp_path_factory.mktemp("killed")
    epochs = 0
    for _ in range(data.draw(st.integers(1, 4), "attempts")):
        tracker = started(directory, history_of(epochs))
        assert tracker.file is not None
        path = Path(tracker.file.name)
        before = path.stat().st_size
        for _ in range(data.draw(st.integers(0, 3), "epochs")):
            epochs += 1
            before = path.stat().st_size
            tracker.update(history_of(epochs))
        check_history(directory, history_of(epochs))  # without an end: nothing waits in memory
        tracker.file.close()
        with path.open("r+b") as file:
            file.truncate(data.draw(st.integers(before, path.stat().st_size), "left"))
        if epochs and data.draw(st.booleans(), "the last checkpoint is damaged"):
            epochs -= 1
    tracker = started(directory, history_of(epochs))
    tracker.finish("FINISHED", history_of(epochs + 1))
    check_history(directory, history_of(epochs + 1))
    assert len(list((directory / tensorboard.FOLDER).iterdir())) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=5), st.integers(1, 6))
def test_csv_has_a_column_for_every_metric_and_every_epoch_once(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[int, bool]], grown_at: int
) -> None:
    directory = tmp_path_factory.mktemp("csv")
    epochs = 0
    for more, torn in attempts:
        tracker = CsvTracker()
        tracker.start({}, {}, directory, resumed=True, history=history_of(epochs, grown_at))
        for _ in range(more):
            epochs += 1
            tracker.update(history_of(epochs, grown_at))
            assert rows(directory) == history_of(epochs, grown_at), "whole after every epoch"
        if torn and (directory / "metrics.csv").exists():
            with (directory / "metrics.csv").open("a") as file:
                file.write("7,1000")
    tracker = CsvTracker()
    tracker.start({}, {}, directory, resumed=True, history=history_of(epochs, grown_at))
    tracker.finish("FINISHED", history_of(epochs + 1, grown_at))
    assert rows(directory) == history_of(epochs + 1, grown_at)


def test_a_csv_that_somebody_has_moved_away_is_written_again(tmp_path: Path) -> None:
    tracker = CsvTracker()
    tracker.start({}, {}, tmp_path, resumed=False)
    tracker.update(history_of(1))
    (tmp_path / "metrics.csv").unlink()
    tracker.update(history_of(2))
    assert rows(tmp_path) == history_of(2)


class Full:
    """A file on a disk that has room for a few bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> None:
        self.file.write(content[: self.room])
        if len(content) > self.room:
            raise OSError(28, "No space left on device")
        self.room -= len(content)

    def flush(self) -> None:
        self.file.flush()


@pytest.mark.parametrize("room", [0, 7, 150])
def test_a_disk_that_was_full_for_a_while_costs_no_epoch(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tolerant, "SHARE", 1e9)  # what failed is tried again at once
    inner = TensorBoardTracker()
    tracker = Tolerant("tensorboard", inner)
    tracker.start(PARAMS, TAGS, tmp_path, resumed=False)
    tracker.update(history_of(1))
    inner.file = Full(inner.file, room)  # type: ignore[assignment]
    tracker.update(history_of(2))
    tracker.update(history_of(3))
    tracker.finish("FINISHED", history_of(4))
    check_history(tmp_path, history_of(4))
    assert caplog.text.count("tracking=tensorboard failed, training goes on without it: [Errno 28] No space left") == 1


class Fragile(Tracker):
    """Fails when it is told to, and keeps what it is told otherwise."""

    made: ClassVar[list[Fragile]] = []

    def __init__(self, at: str = "", run_id: str | None = None) -> None:
        self.at, self.run_id = at, run_id
        self.heard: list[str] = []
        self.made.append(self)

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        if self.at == what:
            raise ZeroDivisionError("no widgets")

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_dir: Path,
        resumed: bool,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self._hear("start")
        self.run_id = "mine"

    def update(self, history: Sequence[Mapping[str, float]]) -> None:
        self._hear("update")

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._hear("artifact")

    def finish(self, status: str, history: Sequence[Mapping[str, float]]) -> None:
        self._hear("finish")


@pytest.fixture(autouse=True)
def none_made_before() -> Iterator[None]:
    Fragile.made.clear()
    yield


@pytest.mark.parametrize("at", ["start", "update", "artifact", "finish"])
def test_a_tracker_that_fails_leaves_the_run_and_the_others_alone(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    also = f"tracking.also=[{{_target_: test_trackers.Fragile, at: {at}}},csv]"
    config = morphtrain.compose(*SMALL, "timing.reference=0", "epochs=2", "tracking=none", also)
    train(config, tmp_path, TAGS)
    assert rows(tmp_path) == read_records(tmp_path)
    assert caplog.text.count("tracking=test_trackers.Fragile failed, training goes on without it: no widgets") == 1
    assert caplog.text.count("tracking=test_trackers.Fragile lacks part of this run") == 1
    (tracker,) = Fragile.made
    assert (tracker.heard[-1] == "finish") == (at != "start"), "what was begun is ended"


@pytest.mark.parametrize("at", ["start", "update", "artifact", "finish"])
def test_a_tracker_of_ones_own_that_is_the_only_one_cannot_stop_the_run(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = ["tracking=custom", "tracking._target_=test_trackers.Fragile", f"+tracking.at={at}"]
    train(morphtrain.compose(*SMALL, "timing.reference=0", "epochs=2", *own), tmp_path, TAGS)
    assert len(read_records(tmp_path)) == 2
    assert caplog.text.count("tracking=test_trackers.Fragile failed, training goes on without it: no widgets") == 1


def test_what_fails_is_tried_again_seldom_and_then_told_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    inner = Fragile("start")
    tracker = Tolerant("own", inner)
    monkeypatch.setattr(tracker.pace, "clock", lambda: clock)
    monkeypatch.setattr(tolerant, "time", SimpleNamespace(monotonic=lambda: clock))
    original = inner._hear

    def slow(what: str) -> None:
        nonlocal clock
        clock += 1
        original(what)

    monkeypatch.setattr(inner, "_hear", slow)
    tracker.start({}, {}, tmp_path, resumed=False)
    for _ in range(1000):
        clock += 1
        tracker.update(history_of(1))
    assert inner.heard.count("start") == 1 + 1000 // 200, "a two-hundredth of the time"
    inner.at = ""
    tracker.artifact(tmp_path)
    clock += 1000
    tracker.update(history_of(2))
    assert inner.heard[-2:] == ["start", "artifact"]
    tracker.update(history_of(3))
    assert inner.heard[-1] == "update"
    assert tracker.run_id == "mine"


def test_each_of_several_goes_on_with_its_own_run(tmp_path: Path) -> None:
    several = Several({"wandb": Fragile(), "csv": CsvTracker(), "my.Own": Fragile()})
    several.start({}, {}, tmp_path, resumed=False)
    assert run_ids(several.run_id, "wandb") == {"wandb": "mine", "my.Own": "mine"}
    assert run_ids("abc", "mlflow") == {"mlflow": "abc"}, "of a run that had one tracker"
    assert run_ids('{"a": "b"}', "my.Own") == {"my.Own": '{"a": "b"}'}, "whatever an id of the user's own looks like"
    assert run_ids(None, "mlflow") == run_ids("several: [1]", "mlflow") == run_ids("several: {", "mlflow") == {}


@pytest.mark.slow
def test_several_are_resumed_each_in_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow then keeps the runs' files
    own = "tracking.also=[csv,{_target_: test_trackers.Fragile}]"
    overrides = [*SMALL, "timing.reference=0", "epochs=3", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", own]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    train(morphtrain.compose(*overrides), run_dir, TAGS, on_epoch=lambda record: record["epoch"] == 1)
    train(morphtrain.compose(*overrides, "resume=auto"), run_dir, TAGS)
    from mlflow.tracking import MlflowClient

    (run,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    steps = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(run.info.run_id, "val_loss")
    assert [metric.step for metric in steps] == [1, 2, 3]
    assert Fragile.made[1].run_id == "mine"
    assert rows(run_dir) == read_records(run_dir)
    assert len(rows(run_dir)) == 3


@pytest.mark.slow
def test_a_killed_command_goes_on_where_its_trackers_were(command: Command, kill: Kill, tmp_path: Path) -> None:
    here = [*QUICK, "epochs=4", "hydra.run.dir=run"]
    kill("step:40", *here)
    assert len(scalars(tmp_path / "run", "val_loss")) == 2
    result = command(*here, "resume=auto")
    assert result.returncode == 0, result.stderr
    history = read_records(tmp_path / "run")
    assert len(history) == 4
    check_history(tmp_path / "run", history)
    assert rows(tmp_path / "run") == history
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("next:"))
    assert line.endswith("; to compare: tensorboard --logdir .")


REFUSED = {
    "no list": ("csv", "tracking.also=csv: must be a list, as [tensorboard,csv]"),
    "unknown": ("[comet]", "tracking.also[0]=comet: must be one of csv, tensorboard, wandb, or a node with a _target_"),
    "mlflow": ("[csv,mlflow]", "tracking.also[1]=mlflow: .* MLflow is tracking=mlflow itself"),
    "twice": ("[csv,csv]", "csv would track the run twice"),
    "a key": ("[{name: wandb, mode: never}]", "tracking.mode=never: must be one of online, offline, disabled, or null"),
    "a type": ("[{name: wandb, project: [1]}]", "tracking.also[0].project=[1]: must be text"),
    "no key": ("[{name: csv, mode: x}]", "tracking.also[0].mode=x: "),
    "nested": ("[{name: csv, also: [wandb]}]", "tracking.also[0]={'name': 'csv', 'also': ['wandb']}: must be one of"),
    "no name": ("[{mode: offline}]", "tracking.also[0]={'mode': 'offline'}: must be one of"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_in_the_further_trackers_is_named(mistake: str) -> None:
    value, message = REFUSED[mistake]
    pattern = message.replace("[", r"\[").replace("{", r"\{").replace("(", r"\(")
    with pytest.raises(UserError, match=pattern):
        morphtrain.compose(f"tracking.also={value}")


def test_beside_a_tracker_of_your_own_there_is_none_but_it_may_be_one_of_several() -> None:
    own = "test_trackers.Fragile"
    with pytest.raises(UserError, match=r"tracking.also=\['csv'\]: .*; tracking=none 'tracking.also=(.*)' has several"):
        morphtrain.compose("tracking=custom", f"tracking._target_={own}", "+tracking.also=[csv]")
    several = morphtrain.compose("tracking=none", f"tracking.also=[{{_target_: {own}}},csv]").tracking.also
    assert [option.name for option in several] == [own, "csv"]


def test_further_trackers_have_the_defaults_of_their_files() -> None:
    config = morphtrain.compose("tracking=none", "tracking.also=[{name: wandb, mode: offline},csv]")
    first, second = config.tracking.also
    assert (first.mode, first.project, second.name) == ("offline", "morphtrain", "csv")


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_said_in_a_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = morphtrain.schema.tracking.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(UserError, match=rf"tracking={package}: not installed; pip install 'morphtrain\[{package}\]'"):
        morphtrain.compose(f"tracking={package}")
    with pytest.raises(UserError, match=rf"pip install 'morphtrain\[{package}\]'"):
        morphtrain.compose("tracking=none", f"tracking.also=[{package}]")


def test_a_moved_run_keeps_its_event_files(tmp_path: Path) -> None:
    """And so does one whose name has changed with a longer run."""
    (tmp_path / "a").mkdir()
    started(tmp_path / "a", history_of(2))
    shutil.move(tmp_path / "a", tmp_path / "b")
    tracker = TensorBoardTracker()
    tracker.start(PARAMS, {"name": "another"}, tmp_path / "b", resumed=True, history=history_of(3))
    check_history(tmp_path / "b", history_of(3))
