"""A study that several workers share, one of which is killed: no trial is lost, none is done twice."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from morphtrain.files import named_lock
from morphtrain.sweep import workers
from morphtrain.sweep.storage import open_storage

WORKER = str(Path(__file__).with_name("shared_worker.py"))


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty storage of each kind."""
    if request.param == "postgresql":
        yield request.getfixturevalue("postgres").database()
    else:
        yield f"{request.param}:///{tmp_path}/study.db"


def start(storage: str, directory: Path, total: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, WORKER, storage, str(directory), str(total), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_three_workers_one_of_them_killed(storage: str, tmp_path: Path) -> None:
    """Workers of one file system: the lock file tells at once that one is dead."""
    victim = start(storage, tmp_path, 20, 0.4)
    others = [start(storage, tmp_path, 20, 0.1) for _ in range(2)]
    assert victim.stdout is not None
    number = int(victim.stdout.readline())  # in the middle of a trial
    victim.kill()
    victim.wait()
    printed = [other.communicate(timeout=120)[0].split() for other in others]
    assert [other.returncode for other in others] == [0, 0]
    trials = optuna.load_study(study_name="shared", storage=open_storage(storage)).trials
    assert [trial.number for trial in trials] == list(range(20))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert all(printed), "both took part"
    done = [int(number) for numbers in printed for number in numbers]
    assert len(done) == len(set(done)), "no trial was done twice"
    assert number in done, "what the dead one had begun was taken up by another"
    assert len({trial.params["x"] for trial in trials}) == 20, "workers with one seed do not draw the same"


def test_a_silent_worker_of_another_machine_is_taken_for_dead_in_time(tmp_path: Path) -> None:
    now = time.time()
    silent = {workers.LOCK_ATTR: str(tmp_path / "of another machine"), workers.BEAT_ATTR: now - 5}
    assert not workers.abandoned(silent, heartbeat_seconds=2)
    assert workers.abandoned(silent, heartbeat_seconds=1)


def test_a_worker_whose_lock_can_be_seen_is_alive_however_silent(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage)
    with workers.Worker(storage, tmp_path, heartbeat_seconds=1000) as worker:
        trial = study.ask()
        worker.take(trial._trial_id)
        code = f"""
import sys
from morphtrain.sweep.workers import BEAT_ATTR, LOCK_ATTR, abandoned
sys.exit(abandoned({{LOCK_ATTR: {str(worker.path)!r}, BEAT_ATTR: 0.0}}, 0.001))
"""
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    attrs = storage.get_trial(trial._trial_id).user_attrs
    assert workers.abandoned({**attrs, workers.BEAT_ATTR: 0.0}, 1000), "the lock went with the worker"


def test_the_heartbeat_lasts_until_a_trial_is_dropped(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage)
    with workers.Worker(storage, tmp_path, heartbeat_seconds=0.02) as worker:
        trial = study.ask()
        worker.take(trial._trial_id)
        first = storage.get_trial(trial._trial_id).user_attrs[workers.BEAT_ATTR]
        time.sleep(0.3)
        assert storage.get_trial(trial._trial_id).user_attrs[workers.BEAT_ATTR] > first + 0.1
        worker.drop(trial._trial_id)
        study.tell(trial, 1.0)
        time.sleep(0.1)  # a beat of a finished trial would raise in the thread, and be logged
    assert storage.get_trial(trial._trial_id).state == TrialState.COMPLETE


def test_a_search_leaves_the_locks_of_those_who_run_its_end(tmp_path: Path) -> None:
    """By them a worker that was killed there is known at once to be dead, not after some silent minutes."""
    dead = tmp_path / f"{workers.CONFIRM_PREFIX}here-1.lock"
    dead.touch()
    with workers.Worker(optuna.storages.InMemoryStorage(), tmp_path, heartbeat_seconds=1000) as worker:
        worker.remove_dead()
        assert dead.exists()
    attrs = {workers.LOCK_ATTR: str(dead), workers.BEAT_ATTR: time.time()}
    assert workers.abandoned(attrs, 1000)
    with workers.Worker(optuna.storages.InMemoryStorage(), tmp_path, 1000, workers.CONFIRM_PREFIX) as worker:
        worker.remove_dead()
        assert list(tmp_path.iterdir()) == [worker.path]


def test_lock_files_of_dead_workers_are_removed(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    dead = tmp_path / ".worker-here-1.lock"
    dead.write_text("1")
    with (
        workers.Worker(storage, tmp_path, heartbeat_seconds=1000) as worker,
        named_lock(tmp_path / ".worker-here-2.lock", "2"),
    ):
        worker.remove_dead()
        assert {path.name for path in tmp_path.iterdir()} == {worker.path.name, ".worker-here-2.lock"}
    assert list(tmp_path.iterdir()) == []
