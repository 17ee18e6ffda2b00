"""What a run leaves in its directory apart from the checkpoint: records and environment, whatever the tracker is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill

import morphtrain
from morphtrain import files
from morphtrain.errors import UserError
from morphtrain.evidence.records import FILE, read_records
from morphtrain.run import run_name
from morphtrain.tracker import Tracker
from morphtrain.trainer import directory, environment, train

QUICK = [*SMALL, "device=cpu", "epochs=3"]


def history(run_dir: Path) -> list[dict[str, float]]:
    stored = torch.load(run_dir / "last.pt", weights_only=True)
    return json.loads(stored["facts"])["history"]  # type: ignore[no-any-return]


class Told(Tracker):
    """Looks into the run directory whenever it is told of an epoch."""

    seen: list[int] = []  # noqa: RUF012 (shared on purpose: the run makes the instance)

    def start(self, params: Any, tags: Any, run_dir: Path, resumed: bool, history: Any = ()) -> None:
        self.run_dir = run_dir

    def update(self, history: Any) -> None:
        assert [record["epoch"] for record in read_records(self.run_dir)] == [record["epoch"] for record in history]
        self.seen.append(len(history))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def finish(self, status: str, history: Any) -> None:
        pass


def test_an_epoch_is_on_disk_before_the_tracker_is_told(tmp_path: Path) -> None:
    Told.seen.clear()
    own = ["tracking=custom", "tracking._target_=test_run_directory.Told"]
    train(morphtrain.compose(*QUICK, *own), tmp_path, {})
    assert Told.seen == [1, 2, 3]
    assert read_records(tmp_path) == history(tmp_path)


@pytest.mark.parametrize("event", ["write:2", "rename:4", "step:40"])
def test_a_killed_run_leaves_every_epoch_once(event: str, command: Command, kill: Kill, tmp_path: Path) -> None:
    here = [*QUICK, "tracking=none", "hydra.run.dir=run"]
    kill(event, *here)
    with (tmp_path / "run" / FILE).open("a") as file:
        file.write('{"epoch": 3, "train_lo')  # a line cut off while it was being written
    assert command(*here, "resume=auto").returncode == 0
    assert [record["epoch"] for record in read_records(tmp_path / "run")] == [1, 2, 3]
    assert read_records(tmp_path / "run") == history(tmp_path / "run")


def test_the_environment_is_that_of_this_machine_and_this_code(tmp_path: Path, monkeypatch: Any) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    monkeypatch.chdir(tmp_path)
    facts = environment.describe(torch.device("cpu"))
    assert facts["git_commit"] == commit.stdout.strip()
    assert facts["git_clean"] == "true"
    assert (facts["host"], facts["torch"]) == (platform.node(), torch.__version__)
    assert facts["morphtrain"] == morphtrain.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    assert facts["processor"]
    (tmp_path / "net.py").write_text("a = 1")
    subprocess.run(["git", "add", "net.py"], check=True)
    assert environment.describe(torch.device("cpu"))["git_clean"] == "false"
    (tmp_path / ".git" / "index").write_text("broken")
    assert "git_clean" not in environment.describe(torch.device("cpu"))  # git cannot tell
    monkeypatch.setattr(environment, "_git", lambda *_: None)  # outside of a repository, or without git
    assert not {"git_commit", "git_clean"} & set(environment.describe(torch.device("cpu")))


def test_a_run_that_goes_on_elsewhere_keeps_where_it_was(tmp_path: Path) -> None:
    first, second = {"host": "a", "threads": "2"}, {"host": "b", "threads": "2"}
    for facts in (first, first, second, second):
        environment.write(tmp_path, facts)
    assert json.loads((tmp_path / environment.FILE).read_text()) == {**second, "before": [first]}


def test_runs_are_called_after_what_tells_them_apart() -> None:
    def name(*typed: str, trial: int | None = None) -> str:
        choices = {"model": "resnet8"}
        settings = SimpleNamespace(
            overrides=SimpleNamespace(task=list(typed)), runtime=SimpleNamespace(choices=choices)
        )
        return run_name(settings, SimpleNamespace(seed=1, trial=trial))  # type: ignore[arg-type]

    assert name() == "resnet8 seed=1"
    assert name("prune=prunetrain", "optimizer.lr=0.05") == "resnet8 prune=prunetrain optimizer.lr=0.05 seed=1"
    assert name("model=vgg8", "seed=3") == "model=vgg8 seed=3"
    assert name("seed=3", "model=vgg8") == "model=vgg8 seed=3", "as a grid orders them"
    silent = ("tracking.uri=postgresql://u:secret@h/db", "resume=auto", "+timing.cores=1", "trial=4")
    assert name("grow=wider", *silent, trial=4) == "trial 4: resnet8 grow=wider seed=1"


@pytest.mark.parametrize("content", [b'{"host": "a', b"[]", b'{"before": "x"}', b"", b"\xff\xfe"])
def test_a_damaged_environment_is_written_again(content: bytes, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / environment.FILE).write_bytes(content)
    environment.write(tmp_path, {"host": "b"})
    assert json.loads((tmp_path / environment.FILE).read_text()) == {"host": "b"}
    assert "damaged" in caplog.text


HOLDER = """
import sys
from pathlib import Path
from morphtrain.trainer.directory import occupied
with occupied(Path(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_one_ends(command: Command, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    holder = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "has it\n"
        here = [*QUICK, "tracking=none", "hydra.run.dir=run", "resume=auto"]
        second = command(*here)
        assert second.returncode == 1
        assert f"hydra.run.dir={run_dir}: process {first.pid} on {platform.node()}" in second.stderr
        assert "Traceback" not in second.stderr
        assert {path.name for path in run_dir.iterdir()} == {".run.lock", ".hydra", "run.log"}, "Hydra writes those"
        first.kill()
    half = run_dir / "last.pt.99999999.tmp"
    half.write_text("of a process that was killed while it wrote")
    assert command(*here).returncode == 0, "the lock went with its process"
    assert not half.exists()
    assert not (run_dir / ".run.lock").exists()
    assert [record["epoch"] for record in read_records(run_dir)] == [1, 2, 3]


FORKING = """
import os, sys, time
from pathlib import Path
from morphtrain.trainer.directory import occupied
with occupied(Path(sys.argv[1])):
    if child := os.fork():
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_forked_helper_does_not_keep_the_directory_of_a_killed_run(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", FORKING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        helper = int(first.stdout.readline())
        first.kill()
        first.wait()
        with directory.occupied(tmp_path):
            assert (tmp_path / ".run.lock").read_text().startswith(f"process {os.getpid()} ")
        os.kill(helper, signal.SIGKILL)


def test_where_there_are_no_locks_a_run_is_warned(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with directory.occupied(tmp_path):
        assert "has no locks" in caplog.text


@pytest.mark.parametrize("name", ["last.pt", "previous.pt"])
def test_a_run_does_not_start_over_a_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("of an earlier run")
    with pytest.raises(UserError, match="resume=auto goes on from it"):
        train(morphtrain.compose(*QUICK, "tracking=none"), tmp_path, {})
    assert (tmp_path / name).read_text() == "of an earlier run"


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_what_is_saved_is_there_at_every_moment(links: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """Killed between any two of its calls of the system, and started again: `last` is whole, `previous` older."""
    last, previous = tmp_path / "last", tmp_path / "previous"
    calls = {name: getattr(os, name) for name in ("replace", "link")}
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))

    class Killed(BaseException):
        pass

    def dying(name: str, countdown: list[int]) -> Any:
        def call(*paths: Any) -> None:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            calls[name](*paths)

        return call

    for moment in range(1, 5):
        for content in (b"1", b"2"):
            files.write_atomically(last, content, previous=previous)
        with monkeypatch.context() as patch:
            countdown = [moment]
            for name in ("replace", "link") if links else ("replace",):
                patch.setattr(os, name, dying(name, countdown))
            with contextlib.suppress(Killed):
                files.write_atomically(last, b"3", previous=previous)
        if links:
            assert last.read_bytes() in (b"2", b"3")
        assert (last if last.exists() else previous).read_bytes() in (b"2", b"3")
        files.write_atomically(last, b"4", previous=previous)
        assert last.read_bytes() == b"4"
        files.remove_left_over(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"last", "previous"}
