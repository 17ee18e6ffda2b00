"""SIGINT and SIGTERM end a run or a sweep in order, at any moment; a second one ends it at once."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KILLED_RUN, SMALL
from fork_server import ForkServer
from sqlalchemy import Engine, event
from torch import nn

import morphtrain
from morphtrain import interrupts
from morphtrain.evidence.records import read_records
from morphtrain.tracking import store
from morphtrain.trainer import checkpoint, epoch, train
from morphtrain.trainer.interruptible import interruptible

HANDLERS = {number: signal.SIG_DFL for number in interrupts.SIGNALS} | {signal.SIGINT: signal.default_int_handler}


@pytest.fixture(autouse=True)
def handlers_are_given_back() -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}  # `nohup` ignores some
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == HANDLERS


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def later(seconds: float, number: int = signal.SIGINT) -> None:
    threading.Timer(seconds, send, (number,)).start()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{directory}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)  # where MLflow then keeps the runs' files
        store.connect(uri, "morphtrain")
    return uri


def statuses(uri: str, run_dir: Path) -> list[str]:
    """Of the MLflow runs of a directory; fails at once if somebody has left the database locked."""
    with closing(sqlite3.connect(uri.removeprefix(store.SQLITE), timeout=0)) as open_database:
        open_database.execute("BEGIN IMMEDIATE")
        query = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE key = 'run_dir' AND tags.value = ?"
        return [status for (status,) in open_database.execute(query, (str(run_dir),))]


def at(owner: Any, name: str, count: int, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Patches a function so that the signal comes inside its call `count`."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original, calls = getattr(owner, name), []

        def signalling(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == count:
                send(number)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, signalling)

    return patch


MOMENTS = {
    "in a step": at(torch.optim.SGD, "step", 20, signal.SIGINT),
    "in an evaluation": at(epoch, "evaluate", 2, signal.SIGTERM),
    "in a save": at(os, "replace", 3, signal.SIGINT),
    "in the last epoch's save": at(checkpoint, "save", 3, signal.SIGTERM),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_waits_until_the_run_can_stop(
    moment: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = morphtrain.compose(*SMALL, "epochs=3", f"tracking.uri={database}", "tracking.flush_seconds=0")
    MOMENTS[moment](monkeypatch)
    with pytest.raises(interrupts.Interrupted):
        train(config, tmp_path, {})
    assert statuses(database, tmp_path) == ["KILLED"]
    assert {path.suffix for path in tmp_path.iterdir()} <= {".pt", ".json", ".jsonl", "", ".png"}
    monkeypatch.undo()
    again = morphtrain.compose(*SMALL, "epochs=3", f"tracking.uri={database}", "resume=auto")
    train(again, tmp_path, {})
    assert statuses(database, tmp_path) == ["FINISHED"], "it goes on, and the signal is forgotten"


@pytest.mark.parametrize("statement", range(3, 40, 6))
def test_a_signal_inside_a_callback_of_the_database_is_neither_lost_nor_locks_it(
    statement: int, database: str, tmp_path: Path
) -> None:
    """Raised in there, an exception leaves the transaction open, or is swallowed."""
    seen = []

    def count(*_: Any) -> None:
        seen.append(1)
        if len(seen) == statement:
            send()

    config = morphtrain.compose(*SMALL, "epochs=3", f"tracking.uri={database}", "tracking.flush_seconds=0")
    event.listen(Engine, "after_cursor_execute", count)
    try:
        with pytest.raises(interrupts.Interrupted):
            train(config, tmp_path, {})
    finally:
        event.remove(Engine, "after_cursor_execute", count)
    assert statuses(database, tmp_path) == ["KILLED"]


class Slow(nn.Module):
    """A layer that takes a tenth of a second in each direction."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleep.apply(x)


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return x * 2

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return gradient * 2


@pytest.mark.parametrize("after", [0.05, 1.05], ids=["forward", "backward"])
def test_a_signal_in_a_long_step_waits_for_one_layer(after: float) -> None:
    network = nn.Sequential(*(Slow() for _ in range(10)))
    x = torch.ones(2, requires_grad=True)
    start = time.monotonic()
    with pytest.raises(interrupts.Interrupted), interrupts.deferred(), interruptible():
        later(after)
        network(x).sum().backward()
    assert time.monotonic() - start < after + 0.45
    with interruptible():
        network[:2](x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [4, 4], "without a signal nothing changes"


def test_nothing_of_a_long_step_changes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    gradients = []
    for context in (interruptible(), torch.enable_grad()):
        network.zero_grad()
        with context:
            network(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_signal_after_the_last_question_is_raised_at_the_end() -> None:
    with pytest.raises(interrupts.Interrupted), interrupts.deferred():
        send(signal.SIGTERM)
    with interrupts.deferred():
        interrupts.check()


def test_an_error_after_a_signal_is_its_consequence() -> None:
    with pytest.raises(interrupts.Interrupted) as caught, interrupts.deferred():
        send()
        raise RuntimeError("a helper process was ended by the same signal")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_somebody_else_handles_stays_his(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's launcher handles SIGTERM; a shell has its background processes ignore SIGINT."""
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.deferred():
            send(signal.SIGTERM)
            send(signal.SIGINT)
            interrupts.check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [signal.SIGTERM]


def test_other_threads_change_no_handlers() -> None:
    seen: list[Any] = []

    def run() -> None:
        with interrupts.deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_second_signal_in_a_library_is_pythons_own() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.deferred():
        send()
        time.sleep(0.6)
        send()
    assert not isinstance(caught.value, interrupts.Interrupted)


COMMAND = """
import sys, time
from morphtrain import interrupts
with interrupts.command():
    print("ready", flush=True)
    {body}
    print("done", flush=True)
"""


def command(body: str) -> subprocess.Popen[str]:
    """A process with this in the place of a command's work, which has just begun it."""
    listens = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body)], stdout=subprocess.PIPE, text=True, preexec_fn=listens
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_at_once(number: signal.Signals) -> None:
    with command("time.sleep(60)") as process:
        process.send_signal(number)
        time.sleep(0.6)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(2) == 128 + number


def test_two_signals_in_the_same_moment_are_one() -> None:
    """`timeout` signals its child, and then all of its group."""
    with command("time.sleep(1); print('in order', flush=True)") as process:
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        out, _ = process.communicate(timeout=10)
    assert "in order" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_there_is_nothing_to_lose_the_first_one_does(number: signal.Signals) -> None:
    body = "\n    with interrupts.at_once(): time.sleep(60)"
    with command(body) as process:
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(2) == 128 + number


def test_a_library_leaves_the_users_own_processes_alone() -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    with pytest.raises(interrupts.Interrupted), interrupts.deferred():
        send()
    time.sleep(0.1)
    assert child.is_alive()
    child.kill()
    child.join()


WORKER = """
import multiprocessing, os, sys, time
from morphtrain import interrupts
sys.stdin.close()
if os.fork():
    time.sleep(0.3)
    os._exit(0)
interrupts.become_worker()
try:
    interrupts.wait(60)
except interrupts.Interrupted:
    print("stopped", flush=True)
"""


def test_a_worker_does_not_outlive_its_sweep() -> None:
    result = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=20)
    assert result.stdout == "stopped\n"


def test_a_wait_ends_with_the_signal() -> None:
    start = time.monotonic()
    with pytest.raises(interrupts.Interrupted), interrupts.deferred():
        later(0.1)
        interrupts.wait(30)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("event_and_signal", "mode"), [("sql:70:TERM", "run"), ("step:40:INT", "run"), ("sql:350:INT", "sweep")]
)
def test_a_command_ends_in_order(
    event_and_signal: str, mode: str, database: str, fork_server: ForkServer, tmp_path: Path
) -> None:
    sweep = (
        "-m",
        "hydra/sweeper=morphtrain",
        "hydra.sweep.dir=sweep",
        "optimizer.lr=0.05,0.1",
        "hydra.sweeper.n_trials=9",
    )
    options = sweep if mode == "sweep" else ("hydra.run.dir=run",)
    arguments = (*SMALL, "epochs=50", f"tracking.uri={database}", "tracking.flush_seconds=0", *options)
    began = tmp_path / "signalled"
    with closing(sqlite3.connect(database.removeprefix(store.SQLITE))) as before:
        (already,) = before.execute("SELECT COUNT(*) FROM runs").fetchone()
    result = fork_server.run([KILLED_RUN, event_and_signal, *arguments], tmp_path, {"SIGNALLED_AT": str(began)})
    assert time.monotonic() - float(began.read_text()) < 3, "two seconds, and one for a busy machine"
    assert result.returncode == (143 if event_and_signal.endswith("TERM") else 130), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "interrupted; go on with" in result.stdout
    with closing(sqlite3.connect(database.removeprefix(store.SQLITE), timeout=0)) as after:
        after.execute("BEGIN IMMEDIATE")
        states = [state for (state,) in after.execute("SELECT status FROM runs")][already:]
    assert set(states) == {"KILLED"}
    assert len(states) == (2 if mode == "sweep" else 1), "a sweep's own run, too"
    if mode == "sweep":
        with closing(sqlite3.connect(tmp_path / "optuna.db", timeout=0)) as study:
            study.execute("BEGIN IMMEDIATE")
            assert study.execute("SELECT state FROM trials").fetchall() == [("WAITING",)]


def test_a_signal_between_two_pictures_draws_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing that says that the run has ended."""
    at(sys.modules["morphtrain.trainer.train"], "plot_widths", 1, signal.SIGTERM)(monkeypatch)
    with pytest.raises(interrupts.Interrupted):
        train(morphtrain.compose(*SMALL, "tracking=none"), tmp_path, {})
    assert (tmp_path / "widths.png").exists()
    assert not (tmp_path / "run.png").exists()


def test_an_interrupted_grid_goes_on_as_it_says(tmp_path: Path) -> None:
    """Its first job had ended, and is not trained again."""
    grid = ("-m", *SMALL, "epochs=2", "tracking=none", "timing.reference=0", "seed=1,2")  # 32 steps a job

    def go(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command, *grid],
            cwd=tmp_path,
            env={**os.environ, "SIGNALLED_AT": str(tmp_path / "signalled")},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            capture_output=True,
            text=True,
            timeout=120,
        )

    ended = go(KILLED_RUN, "step:40:INT")
    assert ended.returncode == 130, ended.stderr
    hint = re.search(r"go on with the same command, hydra\.sweep\.dir=(\S+) and resume=auto", ended.stdout)
    assert hint is not None, ended.stdout
    first, second = (tmp_path / hint[1] / job for job in ("0", "1"))
    before = (first / "last.pt").stat().st_mtime_ns
    grid = (*grid, f"hydra.sweep.dir={hint[1]}", "resume=auto")
    again = go("-m", "morphtrain.run")
    assert again.returncode == 0, again.stderr
    assert [len(read_records(job)) for job in (first, second)] == [2, 2]
    assert (first / "last.pt").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("to", ["the command", "all of its processes"])
def test_a_sweep_in_several_processes_ends_in_order(to: str, database: str, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = (
        "-m",
        "hydra/sweeper=morphtrain",
        "hydra.sweep.dir=sweep",
        "optimizer.lr=interval(0.05,0.1)",
        "hydra.sweeper.n_jobs=2",
    )
    study = f"hydra.sweeper.study_name={tmp_path.name}"  # MLflow keeps one run a study
    launcher = (study, "+launcher=joblib", "hydra.launcher.n_jobs=2", f"tracking.uri={database}", "epochs=500")
    with closing(sqlite3.connect(database.removeprefix(store.SQLITE))) as before:
        (already,) = before.execute("SELECT COUNT(*) FROM runs").fetchone()
    process = subprocess.Popen(
        [sys.executable, "-m", "morphtrain.run", *SMALL, *sweep, *launcher],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not all((tmp_path / f"sweep/{number}/last.pt").exists() for number in (0, 1)):
        assert process.poll() is None
        time.sleep(0.05)
    (os.kill if to == "the command" else os.killpg)(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert "Error executing job" not in said
    with closing(sqlite3.connect(database.removeprefix(store.SQLITE), timeout=0)) as after:
        after.execute("BEGIN IMMEDIATE")
        assert [state for (state,) in after.execute("SELECT status FROM runs")][already:] == ["KILLED"] * 3
    with closing(sqlite3.connect(tmp_path / "optuna.db", timeout=0)) as study:
        assert study.execute("SELECT state FROM trials").fetchall() == [("WAITING",)] * 2


@pytest.mark.slow
def test_signals_and_kills_at_random_moments(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "interruptions.py"
    counts = ["--signals", "60", "--kills", "8", "--seed", str(time.time_ns() % 1000)]
    result = subprocess.run([sys.executable, script, *counts], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
