"""wandb, offline and where nobody answers: what it keeps is read with its own program, and no run waits for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill
from test_interrupts import at

import morphtrain
from morphtrain import interrupts
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.tracking import wandb
from morphtrain.tracking.tolerant import Tolerant
from morphtrain.tracking.wandb import WandbTracker
from morphtrain.trainer import train

QUICK = (*SMALL, "timing.reference=0", "tracking=wandb", "tracking.mode=offline")
TAGS = {"name": "trial 3: resnet8 seed=1", "study": "prunetrain", "prune": "prunetrain", "seed": "1"}


@pytest.fixture(autouse=True)
def a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the settings nor the key of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))


class Listener:
    """A server that says nothing, and counts who came."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.came = 0
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.came += 1
            connection.close()


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """In the place of wandb's server."""
    listener = Listener()
    monkeypatch.setenv("WANDB_BASE_URL", listener.address)
    yield listener
    listener.socket.shutdown(socket.SHUT_RDWR)
    listener.socket.close()


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What wandb's own program reads from the one offline run of a directory."""
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]


def of_kind(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records(run_dir) if record["type"] == kind]


def check_history(run_dir: Path, history: Sequence[Mapping[str, float]]) -> None:
    """The one offline run of the directory has each value once, and nothing of its own but underscores."""
    found = of_kind(run_dir, "history")
    assert [row["step"]["num"] for row in found] == [record["epoch"] for record in history]
    for row, record in zip(found, history, strict=True):
        items = {key: value for key, value in row["item"].items() if not key.startswith("_")}
        assert items == {key: value for key, value in record.items() if key not in ("epoch", "timestamp")}


def hooks() -> tuple[Any, ...]:
    """What wandb would change in a process."""
    signals = [signal.getsignal(number) for number in interrupts.SIGNALS]
    return (
        sys.exit,
        sys.excepthook,
        sorted({t.name for t in threading.enumerate()} - {"tqdm_monitor"}),
        wandb.SERVICE in os.environ,
        *signals,
    )


def test_an_offline_run_has_all_that_the_records_have_and_tells_nobody(
    listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    before = hooks()
    train(morphtrain.compose(*QUICK, "epochs=3"), run_dir, TAGS)
    assert hooks() == before
    assert listener.came == 0
    assert "wandb:" not in "".join(capfd.readouterr()), "it says nothing of its own"
    check_history(run_dir, read_records(run_dir))
    (run,) = of_kind(run_dir, "run")
    assert (run["project"], run["display_name"], run["run_group"]) == ("morphtrain", TAGS["name"], "prunetrain")
    assert run["config"]["update"]["prune"]["lasso_ratio"] == 0.95
    assert run["config"]["update"]["tags"]["seed"] == "1"
    assert "prune=prunetrain" in run["tags"]
    assert [end.get("exit_code", 0) for end in of_kind(run_dir, "exit")] == [0]
    assert of_kind(run_dir, "output_raw") == []
    (files,) = (run_dir / "wandb").glob("offline-run-*/files")
    for name in ("last.pt", "run.png", "widths.png"):
        assert (files / name).read_bytes() == (run_dir / name).read_bytes()
    assert {path.name for path in (files / "architecture").iterdir()} == {
        path.name for path in (run_dir / "architecture").iterdir()
    }
    written = [path for path in (run_dir / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
    assert not any(key.encode() in path.read_bytes() for path in written)


def test_a_killed_offline_run_goes_on_with_every_epoch_once(command: Command, kill: Kill, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path / "home")}
    here = [*QUICK, "epochs=4", "hydra.run.dir=run"]
    kill("step:40", *here, env=env)
    (first,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    result = command(*here, "resume=auto", env=env)
    assert result.returncode == 0, result.stderr
    (second,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert first.name != second.name
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2], "the same run"
    assert len(read_records(tmp_path / "run")) == 4
    check_history(tmp_path / "run", read_records(tmp_path / "run"))
    assert f"; to compare: wandb sync run/wandb/{second.name}" in result.stdout


def test_a_signal_ends_a_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(torch.optim.SGD, "step", 40, signal.SIGINT)(monkeypatch)
    before = hooks()
    with pytest.raises(interrupts.Interrupted):
        train(morphtrain.compose(*QUICK, "epochs=4"), tmp_path, TAGS)
    assert hooks() == before
    check_history(tmp_path, read_records(tmp_path))
    assert len(read_records(tmp_path)) == 2
    assert [end["exit_code"] for end in of_kind(tmp_path, "exit")] == [1]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is waited for wandb's server."""
    seconds = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), 1.0)
    monkeypatch.setattr(wandb, "SETTINGS", {**wandb.SETTINGS, **seconds})


@pytest.mark.parametrize("server", ["gone", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_server_that_does_not_answer_does_not_stop_training(
    server: str,
    impatient: None,
    listener: Listener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if server == "gone":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    before = hooks()
    train(morphtrain.compose(*SMALL, "timing.reference=0", "epochs=2", "tracking=wandb"), tmp_path, TAGS)
    assert hooks() == before
    assert (listener.came > 0) == (server == "silent")
    assert caplog.text.count("tracking=wandb failed, training goes on without it: ") == 1
    assert caplog.text.count("tracking=wandb lacks part of this run; records.jsonl has all of it") == 1
    assert len(read_records(tmp_path)) == 2


def test_without_a_key_it_says_how_to_log_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tolerant("wandb", WandbTracker("online", "morphtrain"))
    tracker.start({}, TAGS, tmp_path, resumed=False)
    assert "wandb login" in caplog.text
    assert not tracker.started


def history_of(epochs: int) -> list[dict[str, float]]:
    return [{"epoch": e, "timestamp": 1000.0 + e, "val_accuracy": e / 8} for e in range(1, epochs + 1)]


def test_disabled_it_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = WandbTracker(None, "morphtrain")
    tracker.start({}, TAGS, tmp_path, resumed=False)
    tracker.update(history_of(2))
    (tmp_path / "a.png").touch()
    tracker.artifact(tmp_path / "a.png")
    tracker.finish("FINISHED", history_of(3))
    assert tracker.view() == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"a.png", "home"}


@pytest.mark.parametrize(("given", "mode"), [("", "online"), ("dryrun", "offline"), ("run", "online")])
def test_the_environment_says_the_mode_in_wandbs_own_words(
    given: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", given)
    assert WandbTracker(morphtrain.compose("tracking=wandb").tracking.mode, "morphtrain").mode == mode
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(UserError, match=r"^WANDB_MODE=nonsense: must be one of online, offline, disabled$"):
        morphtrain.compose("tracking=wandb")
    assert morphtrain.compose("tracking=wandb", "tracking.mode=offline").tracking.mode == "offline"


def test_a_run_of_the_callers_own_goes_on(tmp_path: Path) -> None:
    import wandb as package

    for name in ("own", "ours"):
        (tmp_path / name).mkdir()
    with package.init(mode="offline", dir=tmp_path / "own", settings=package.Settings(**wandb.SETTINGS)) as own:
        tracker = WandbTracker("offline", "morphtrain")
        tracker.start({}, TAGS, tmp_path / "ours", resumed=False, history=history_of(2))
        tracker.finish("FINISHED", history_of(3))
        own.log({"mine": 1.0}, step=7, commit=True)
    package.teardown()
    check_history(tmp_path / "ours", history_of(3))
    assert [row["item"]["mine"] for row in of_kind(tmp_path / "own", "history")] == [1.0]


def test_an_id_from_a_checkpoint_is_no_path() -> None:
    for stored in ("../../etc", "a/b", "*", "", "x" * 65):
        assert WandbTracker("offline", "morphtrain", run_id=stored).run_id is None
    assert WandbTracker("offline", "morphtrain", run_id="0a1b").run_id == "0a1b"


def test_dotted_keys_become_nodes() -> None:
    params = {"a": 1, "b.c": None, "b.d.e": [2], "tracking.also": []}
    assert wandb._nested(params) == {"a": 1, "b": {"c": None, "d": {"e": [2]}}, "tracking": {"also": []}}
