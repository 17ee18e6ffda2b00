"""Shared fixtures: small runs through the real command."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import postgres_server
import pytest
import torch
from fork_server import ForkServer
from hydra.core.global_hydra import GlobalHydra
from process_state import process_state

import morphtrain
from morphtrain import run as run_command
from morphtrain.cost import latency_file
from morphtrain.state import Run
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import start

# A run of a second or two that still prunes: quick to learn, quick to shrink.
SMALL = (
    "data=synthetic",
    "data.train_samples=256",
    "data.val_samples=64",
    "data.image_size=8",
    "model.width=8",
    "model.blocks=2",
    "batch_policy.batch_size=16",
    "epochs=6",
    "prune=prunetrain",
    "prune.lasso_ratio=0.95",
    "prune.lasso_ratio_of=loss",  # the strength that the tests were tuned with
    "prune.interval=1",
    "prune.start_epoch=2",
)

KILLED_RUN = str(Path(__file__).with_name("killed_run.py"))

Command = Callable[..., subprocess.CompletedProcess[str]]
Kill = Callable[..., None]
Answer = Callable[..., str]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def command(fork_server: ForkServer, tmp_path: Path) -> Command:
    """Run `python -m morphtrain.run ...` in a fresh directory."""

    def run(
        *overrides: str, cwd: Path = tmp_path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return fork_server.run(["-m", "morphtrain.run", *overrides], cwd, env)

    return run


@pytest.fixture
def kill(fork_server: ForkServer, tmp_path: Path) -> Kill:
    """Run the command until it kills itself at an event of killed_run.py, such as "step:40"."""

    def run(moment: str, *overrides: str, env: dict[str, str] | None = None) -> None:
        result = fork_server.run([KILLED_RUN, moment, *overrides], tmp_path, env)
        assert result.returncode == -signal.SIGKILL, f"{moment} never came: {result.stdout}{result.stderr}"

    return run


@pytest.fixture
def fresh_command(tmp_path: Path) -> Command:
    """`command` in a new interpreter, where its start is what is tested."""

    def run(*overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "morphtrain.run", *overrides],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answer]:
    """What the command answers to overrides that it refuses, asked in this process: a thirtieth of the time."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)

    def ask(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["morphtrain", *overrides])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it to 1
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as ended:
            run_command.main()
        assert isinstance(ended.value.code, str), "Python prints a text to stderr, and exits with 1"
        return ended.value.code

    yield ask
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="session", autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times that were measured between other tests are of no use to the user."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("latency")
        patch.setattr(latency_file, "directory", lambda: directory)
        yield


@pytest.fixture(autouse=True)
def start_of_a_process() -> None:
    """What no test finds as another one left it: a run flushes denormal numbers to zero, for good."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def nothing_is_left_for_the_next_test() -> Iterator[None]:
    before = process_state()
    yield
    assert process_state() == before


@pytest.fixture(autouse=True)
def modules_of_a_test_end_with_it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Or another test that has a module of the same name would get this one's."""
    yield
    places = {name: str(vars(module).get("__file__")) for name, module in sys.modules.items() if module is not None}
    for name in (name for name, place in places.items() if place.startswith(str(tmp_path_factory.getbasetemp()))):
        del sys.modules[name]


@pytest.fixture
def small_run() -> Callable[..., Run]:
    """A run that is ready for its first epoch."""

    def make(*overrides: str) -> Run:
        run = build_run(morphtrain.compose(*SMALL, *overrides))
        start(run)
        run.epoch = 1
        return run

    return make


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.PostgresServer]:
    """A PostgreSQL of the tests' own; skips where there is none."""
    if reason := postgres_server.missing():
        pytest.skip(reason)
    with postgres_server.running() as server:
        yield server
