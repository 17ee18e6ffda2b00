"""What a run leaves in its directory apart from the checkpoint: records and environment, whatever the tracker is."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import KILLED_RUN, SMALL, Command

import morphtrain
from morphtrain.evidence.records import FILE, read_records
from morphtrain.run import run_name
from morphtrain.tracker import Tracker
from morphtrain.trainer import environment, train

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
def test_a_killed_run_leaves_every_epoch_once(event: str, command: Command, tmp_path: Path) -> None:
    here = [*QUICK, "tracking=none", "hydra.run.dir=run"]
    killed = subprocess.run([sys.executable, KILLED_RUN, event, *here], cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode < 0
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
    silent = ("tracking.uri=postgresql://u:secret@h/db", "resume=auto", "+timing.cores=1", "trial=4")
    assert name("grow=wider", *silent, trial=4) == "trial 4: resnet8 grow=wider seed=1"


@pytest.mark.parametrize("content", [b'{"host": "a', b"[]", b'{"before": "x"}', b"", b"\xff\xfe"])
def test_a_damaged_environment_is_written_again(content: bytes, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / environment.FILE).write_bytes(content)
    environment.write(tmp_path, {"host": "b"})
    assert json.loads((tmp_path / environment.FILE).read_text()) == {"host": "b"}
    assert "damaged" in caplog.text
