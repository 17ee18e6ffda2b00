"""A tracking server that is away, hangs or comes back: training goes on, and in the end every value is there once."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SMALL, Command
from hypothesis import given
from hypothesis import strategies as st
from mlflow_server import Server

import morphtrain
from morphtrain import schema
from morphtrain.addresses import shown
from morphtrain.errors import UserError
from morphtrain.evidence.records import load
from morphtrain.tracking import __main__ as sending
from morphtrain.tracking import mark_disturbed, mlflow, store, unsent
from morphtrain.tracking.mlflow import MLflowTracker
from morphtrain.tracking.pace import Pace
from morphtrain.tracking.unsent import Record
from morphtrain.trainer import train

EPOCHS = 6
TAGS = {"model": "resnet8", "prune": "none", "precision": "o0", "seed": "1"}
Hook = Callable[[], None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests: they leave it running."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits longer than a second for a server."""
    for key, value in store.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(store.TIMEOUT, "1")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again at once."""
    monkeypatch.setattr(mlflow, "SHARE", 1e9)


def a_run(directory: Path, uri: str, hooks: dict[int, Hook], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in `directory`; `hooks` are called by their epoch, between its end and its being reported."""
    update = MLflowTracker.update

    def with_hook(tracker: MLflowTracker, history: list[dict[str, float]]) -> None:
        hooks.get(len(history), lambda: None)()
        update(tracker, history)

    monkeypatch.setattr(MLflowTracker, "update", with_hook)
    overrides = [*SMALL, f"epochs={EPOCHS}", f"tracking.uri={uri}", "tracking.flush_seconds=0", "device=cpu"]
    config = morphtrain.compose(*overrides)
    directory.mkdir()
    tags = {group: "x" for group in schema.OPTIONS}
    assert train(config, directory, {**tags, "study": directory.name})[0] > 0


def values(server: Server, run_id: str, key: str = "train_loss") -> list[tuple[int, float]]:
    """(epoch, value) of a metric, duplicates included."""
    return server.query("SELECT step, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step", run_id, key)


def only_run(server: Server, directory: Path) -> tuple[str, str]:
    """Id and status of the one run of a directory."""
    (row,) = server.query(
        "SELECT r.run_uuid, r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
        "WHERE t.key = 'run_dir' AND t.value = ? AND r.lifecycle_stage = 'active'",
        str(directory),
    )
    return row


def check_all_is_there(server: Server, directory: Path) -> None:
    """What the checkpoint knows, each value once; the params, the files, and how the run ended."""
    from morphtrain.trainer.checkpoint import find

    checkpoint = find(directory)
    assert checkpoint is not None
    run_id, status = only_run(server, directory)
    assert status == "FINISHED"
    history = checkpoint.facts["history"]
    assert len(history) == EPOCHS
    for key in history[0].keys() - {"epoch", "timestamp"}:
        assert values(server, run_id, key) == [(record["epoch"], record[key]) for record in history], key
    params = dict(server.query("SELECT key, value FROM params WHERE run_uuid = ?", run_id))
    assert params["prune.lasso_ratio"] == "0.95"
    assert params["epochs"] == str(EPOCHS)
    (files,) = (server.directory / "artifacts").rglob(f"{run_id}/artifacts")
    assert (files / "last.pt").read_bytes() == (directory / "last.pt").read_bytes()
    architectures = {path.name for path in (directory / "architecture").iterdir()}
    assert {path.name for path in (files / "architecture").iterdir()} == architectures
    assert architectures
    assert not (directory / unsent.FILE).exists()


def test_a_server_that_is_down_at_the_start_gets_all(
    server: Server, eager: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def after_it_is_back() -> None:
        seen.extend(step for step, _ in values(server, only_run(server, tmp_path / "run")[0]))

    a_run(tmp_path / "run", server.uri, {3: server.start, 5: after_it_is_back}, monkeypatch)
    assert seen == [1, 2, 3, 4], "it should not wait for the end"
    check_all_is_there(server, tmp_path / "run")


def test_a_server_that_is_killed_and_started_again_lacks_nothing(
    server: Server, eager: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    a_run(tmp_path / "run", server.uri, {2: server.kill, 5: server.start}, monkeypatch)
    check_all_is_there(server, tmp_path / "run")
    said = [record.message for record in caplog.records if "MLflow" in record.message]
    assert sum("sending values failed, training goes on" in line for line in said) == 1, "once an outage"
    assert sum("values sent" in line for line in said) == 1


def test_a_server_that_hangs_and_goes_on_lacks_nothing(
    server: Server, eager: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then takes what was sent to it while it hung, and nobody waited for the answer."""
    a_run(tmp_path / "run", server.uri, {2: server.stop, 4: server.go_on}, monkeypatch)
    check_all_is_there(server, tmp_path / "run")


def test_what_a_dead_server_lacks_is_sent_later_by_the_command(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    a_run(run_dir, server.uri, {2: server.kill}, monkeypatch)
    assert f"python -m morphtrain.tracking {run_dir} --uri {server.uri}" in caplog.text
    left = run_dir / unsent.FILE
    assert left.stat().st_mode & 0o077 == 0
    assert sending.main([str(run_dir), "--uri", server.uri]) == 1
    assert "something is left" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.start()
    shutil.copy(left, tmp_path / "copy")
    assert sending.main([str(run_dir), str(tmp_path / "nowhere")]) == 1  # one directory does not hinder the other
    assert "nowhere: no such run directory" in capsys.readouterr().err
    check_all_is_there(server, run_dir)
    (ended,) = server.query("SELECT end_time - start_time FROM runs WHERE run_uuid = ?", only_run(server, run_dir)[0])
    assert ended[0] < 60_000, "it ended when training did"

    shutil.copytree(run_dir, moved)
    shutil.copy(tmp_path / "copy", moved / unsent.FILE)
    shutil.rmtree(run_dir / "architecture")
    assert sending.main([str(moved)]) == 0, "a moved directory finds its files"
    shutil.copytree(moved / "architecture", run_dir / "architecture")
    check_all_is_there(server, run_dir)
    assert sending.main([str(run_dir)]) == 0
    assert "nothing to send" in capsys.readouterr().out


def test_a_server_that_never_answers_is_asked_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once at the start, twice at the end: the epochs between are over before a failed second is a hundredth."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def listen() -> None:
            while True:
                try:
                    asked.append(silent.accept())
                except OSError:
                    return

        threading.Thread(target=listen, daemon=True).start()
        a_run(tmp_path / "run", f"http://127.0.0.1:{silent.getsockname()[1]}", {}, monkeypatch)
        assert len(asked) == 3
        silent.shutdown(socket.SHUT_RDWR)
    assert caplog.text.count("failed, training goes on") == 1
    record = unsent.read(tmp_path / "run")
    assert record is not None
    assert record.status == "FINISHED"
    assert [epoch["epoch"] for epoch in record.history] == list(range(1, EPOCHS + 1))


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.001, 30)), min_size=1, max_size=200))
def test_failed_tries_take_their_share_of_the_time(epochs: list[tuple[float, float]]) -> None:
    """Whatever an epoch and a try take, tries before the last one took at most a hundredth of the time until it."""
    now, spent = 0.0, 0.0
    pace = Pace(0.01, clock=lambda: now)
    for epoch_seconds, try_seconds in epochs:
        now += epoch_seconds
        if pace.due:
            assert spent <= 0.01 * now + 1e-9
            now += try_seconds
            spent += try_seconds
            pace.failed(try_seconds)


def history_of(epochs: int, offset: float = 0.0) -> list[dict[str, float]]:
    return [{"epoch": e, "timestamp": 1000.0 + e + offset, "epoch_seconds": 1.0 + e} for e in range(1, epochs + 1)]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs; making one takes a second or two."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    store.connect(f"sqlite:///{path}", "another")
    return path


@pytest.fixture
def here(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a database: artifacts go below it."""
    shutil.copy(empty, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def local_tracker(directory: Path, run_id: str | None = None) -> MLflowTracker:
    return MLflowTracker(f"sqlite:///{directory}/mlflow.db", "e", 0.0, run_id)


def test_a_run_that_no_checkpoint_remembers_is_found_by_its_values(here: Path) -> None:
    """The store came back after the last checkpoint, and the process was killed before the next one."""
    first = local_tracker(here)
    first.start({}, TAGS, here, resumed=False)
    first.update(history_of(3))
    again = local_tracker(here)
    again.start({}, TAGS, here, resumed=True, history=history_of(3))
    assert again.run_id == first.run_id
    assert again.sent_epoch == 3
    for resumed, history in ((True, history_of(3, offset=0.5)), (False, history_of(3))):
        other = local_tracker(here)
        other.start({}, TAGS, here, resumed, history)
        assert other.run_id != first.run_id, "another run of the same directory"
        other.client.delete_run(other.run_id)


def test_a_run_whose_creation_was_not_answered_is_not_created_twice(
    here: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    create = MlflowClient.create_run

    def answer_lost(*args, **kwargs):
        monkeypatch.undo()
        create(*args, **kwargs)
        raise ConnectionError("answer lost")

    tracker = local_tracker(here)
    monkeypatch.setattr(MlflowClient, "create_run", answer_lost)
    tracker.start({"a": 1}, TAGS, here, resumed=False)
    assert tracker.run_id is None
    tracker.update(history_of(1))
    (run,) = tracker.client.search_runs(["2"])
    assert run.info.run_id == tracker.run_id
    assert run.data.params == {"a": "1"}


def test_a_store_that_does_not_know_the_run_gets_all_of_it(here: Path) -> None:
    tracker = local_tracker(here, run_id="0" * 32)
    tracker.start({"a": 1}, TAGS, here, resumed=True, history=history_of(2))
    (run,) = tracker.client.search_runs(["2"])
    assert run.data.metrics["epoch_seconds"] == 3.0
    assert run.data.params == {"a": "1"}


def test_runs_are_found_by_any_tag(here: Path) -> None:
    """MLflow's search language has no escapes."""
    client, experiment_id = store.connect(f"sqlite:///{here}/mlflow.db", "e")
    texts = ["a", "it's", "it_s", 'a "b"', "both'\"", "back\\slash", "end\\", "50%", "x = 'y' AND z", "(é)"]
    made = {text: client.create_run(experiment_id, tags={"study": text}).info.run_id for text in texts}
    for text, run_id in made.items():
        found = store.runs_tagged(client, experiment_id, "study", text)
        assert [run.info.run_id for run in found] == [run_id], text
    assert store.runs_tagged(client, experiment_id, "study", "it-s") == []


def test_a_disturbed_attempt_stays_in_the_store_but_in_no_table(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its repeat has the same directory."""
    uri = f"sqlite:///{here}/mlflow.db"
    trackers = [local_tracker(here) for _ in range(2)]
    for tracker, offset in zip(trackers, (0.0, 100.0), strict=True):
        config = schema.tracking.MLflow("mlflow", uri, "e", 0.0, None)
        if offset:
            mark_disturbed(config, here)
        tracker.start({}, TAGS, here, resumed=True)
        tracker.finish("FINISHED", history_of(2, offset))
    mark_disturbed(config, here / "another")
    mark_disturbed(schema.tracking.Tracking("none"), here)
    assert caplog.text == ""
    first, second = (tracker.client.get_run(tracker.run_id) for tracker in trackers)
    assert (first.data.tags.get("disturbed"), second.data.tags.get("disturbed")) == ("true", None)
    assert set(load(uri, mlflow_experiment="e")["run"]) == {second.info.run_id}
    mark_disturbed(dataclasses.replace(config, uri="http://127.0.0.1:9"), here)
    assert caplog.text.count("was disturbed, which it does not say") == 1


def test_files_that_a_store_refuses_do_not_hold_up_the_rest(
    here: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a server leaves artifacts to its clients, their place may be one that this machine does not have."""
    from mlflow.tracking import MlflowClient

    log_artifact = MlflowClient.log_artifact

    def refuse(client: MlflowClient, run_id: str, path: str, folder: str | None) -> None:
        if path.endswith("bad.txt"):
            raise PermissionError(13, "Permission denied", path)
        log_artifact(client, run_id, path, folder)

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    tracker = local_tracker(here)
    tracker.start({}, TAGS, here, resumed=False)
    for name in ("bad.txt", "good.txt", "gone.txt"):
        (here / name).write_text(name)
        tracker.artifact(here / name)
    (here / "gone.txt").unlink()
    tracker.finish("FINISHED", history_of(2))
    record = unsent.read(here)
    assert record is not None
    assert record.artifacts == [(str(here / "bad.txt"), None)]
    client = MlflowClient(tracker.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["epoch_seconds"] == 3.0
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["good.txt"]
    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    assert sending.main([str(here)]) == 0  # the store in the current directory
    assert {file.path for file in client.list_artifacts(tracker.run_id)} == {"good.txt", "bad.txt"}


def test_passwords_are_not_printed(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    tracker = MLflowTracker("http://me:secret@127.0.0.1:9", "e")
    tracker.start({}, TAGS, tmp_path, resumed=False)
    assert "me:***@127.0.0.1:9" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("secret", ["hush", "hu/sh", "hu@sh", "hu:sh", "hu%40sh"])
def test_passwords_are_not_shown(secret: str) -> None:
    text = shown(f"no postgresql://me:{secret}@host/db no://x:y 'http://:{secret}@host'")
    assert text == "no postgresql://me:***@host/db no://x:y 'http://:***@host'"


def test_what_is_no_password_is_shown() -> None:
    assert shown("x://host/db?user=me&password=hush&sslmode=no") == "x://host/db?user=me&password=***&sslmode=no"
    assert shown("http://host/?api_key=a&access_token=b&v=1") == "http://host/?api_key=***&access_token=***&v=1"
    assert shown("x://host/db?sslkey=a.pem&passfile=b") == "x://host/db?sslkey=a.pem&passfile=b"
    for text in ("sqlite:////a/b@c:d.db", "http://host:80/x", "postgresql://me@host:5432/db?user=me", "a:b@c"):
        assert shown(text) == text


def test_a_record_is_read_as_it_was_written_and_a_broken_one_named(tmp_path: Path) -> None:
    inside = tmp_path / "run" / "a.png"
    record = Record("http://x", "e", "n", {"a": "1"}, {"t": "é"}, 5, history=history_of(2))
    record.artifacts = [(str(inside), "plots")]
    (tmp_path / "run").mkdir()
    unsent.write(record, tmp_path / "run")
    read = unsent.read(tmp_path / "run")
    assert read == record
    assert json.loads((tmp_path / "run" / unsent.FILE).read_text())["artifacts"][0] == ["a.png", "plots"]
    for broken in ("{", "[]", '{"uri": 1}', (tmp_path / "run" / unsent.FILE).read_text().replace('"http://x"', "3")):
        (tmp_path / "run" / unsent.FILE).write_text(broken)
        with pytest.raises(UserError, match=r"unsent\.json: damaged"):
            unsent.read(tmp_path / "run")


def test_a_database_that_never_answers_takes_no_longer_than_a_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        tracker = MLflowTracker(f"postgresql+psycopg://me:secret@127.0.0.1:{port}/db", "e")
        before = time.monotonic()
        tracker.start({}, TAGS, tmp_path, resumed=False)
    assert time.monotonic() - before < 2 * store.PROBE_SECONDS
    assert caplog.text.count("training goes on") == 1
    assert "secret" not in caplog.text
    left = unsent.read(tmp_path)
    assert left is not None
    assert left.status == "RUNNING"


@pytest.mark.parametrize("place", ["gone", "a directory", "no database", "an unwritable directory"])
def test_a_database_that_is_none_is_said_at_once(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mlflow.db"
    uri = f"sqlite:///{path}"
    if place == "gone":
        uri = "postgresql+psycopg://127.0.0.1:9/db"
    elif place == "a directory":
        path.mkdir()
    elif place == "no database":
        path.write_text("something else entirely" * 99)
    else:
        uri = "sqlite:////proc/mlflow.db"
    tracker = MLflowTracker(uri, "e")
    before = time.monotonic()
    tracker.start({}, TAGS, tmp_path, resumed=False)
    assert time.monotonic() - before < 1.5
    assert caplog.text.count("training goes on") == 1
    tracker.finish("KILLED", history_of(1))
    assert time.monotonic() - before < 1.5, "nobody who stops a run waits for a store that is away"
    assert "retried" not in capfd.readouterr().err
    left = unsent.read(tmp_path)
    assert left is not None
    assert left.status == "KILLED"


def test_a_database_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in (
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite+pysqlite://",
        "sqlite:///file:x?mode=memory&uri=true",
    ):
        with pytest.raises(UserError, match=r"tracking\.uri=sqlite.*: must be a place that stays"):
            schema.tracking.MLflow("mlflow", uri, "e", 1.0, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=sqlite://: must be"):
        schema.tracking.MLflow("mlflow", None, "e", 1.0, None)
    schema.tracking.MLflow("mlflow", "sqlite:///mlflow.db", "e", 1.0, None)


def test_what_a_killed_process_left_of_a_database_is_removed(tmp_path: Path) -> None:
    for name in ("mlflow.db.12345.tmp", "mlflow.db.12345.tmp-journal", "mlflow.db.tmp", "other.db.1.tmp"):
        (tmp_path / name).touch()
    store.connect(f"sqlite:///{tmp_path}/mlflow.db", "e")
    assert {path.name for path in tmp_path.iterdir()} - {"mlruns"} == {"mlflow.db", "mlflow.db.tmp", "other.db.1.tmp"}


def test_all_runs_share_the_database_of_the_directory_they_were_started_from(command: Command, tmp_path: Path) -> None:
    """With hydra.job.chdir=true, every run has a current directory of its own."""
    result = command("-m", *SMALL, "epochs=1", "seed=1,2", "hydra.job.chdir=true", "hydra.sweep.dir=runs")
    assert result.returncode == 0, result.stderr
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("mlflow.db")) == [Path("mlflow.db")]
    assert len(list((tmp_path / "mlruns").rglob("last.pt"))) == 2
