"""A study's storage: made once however many start at once, one at a time where it must be, and plain about mistakes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import multiprocessing
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import optuna
import pytest
from postgres_server import PASSWORD, PostgresServer

from morphtrain.errors import UserError
from morphtrain.sweep.storage import dashboard, exclusive, open_storage, without_password

WORKERS = 4
KINDS = ("sqlite", "journal", "postgresql")

barrier: Any = None  # of the workers, each in a process of its own

NewStorage = Callable[[], str]


@pytest.fixture(params=KINDS)
def new_storage(request: pytest.FixtureRequest, tmp_path: Path) -> NewStorage:
    """Makes the address of an empty storage of each kind."""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.database
    names = (f"{request.param}:///{tmp_path}/study{number}" for number in range(1000))
    return lambda: next(names)


@pytest.fixture(scope="module")
def workers() -> Iterator[Callable[..., list]]:
    """Calls a function in all workers at the same time; returns what each of them made of it."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(WORKERS, context, initializer=join, initargs=(context.Barrier(WORKERS, timeout=60),))
    with pool:
        yield lambda *call: [future.result(120) for future in [pool.submit(together, *call) for _ in range(WORKERS)]]


def join(all_here: Any) -> None:
    global barrier
    barrier = all_here


def together(function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception:
        barrier.abort()  # or the others would wait for workers that will not come
        raise


def count(url: str, file: Path, times: int) -> None:
    """Read, wait, write: what loses counts if two do it at once."""
    barrier.wait()
    for _ in range(times):
        with exclusive(url):
            number = int(file.read_text())
            time.sleep(0.002)
            file.write_text(str(number + 1))


def test_one_at_a_time(new_storage: NewStorage, workers: Callable, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    workers(count, new_storage(), counter, 20)
    assert counter.read_text() == str(20 * WORKERS)


HOLD = """
import sys, time
from morphtrain.sweep.storage import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_goes_with_its_holder(new_storage: NewStorage) -> None:
    url = new_storage()
    with subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
    start = time.monotonic()
    with exclusive(url):
        assert time.monotonic() - start < 5


def open_at_once(urls: list[str]) -> None:
    for url in urls:
        barrier.wait()
        open_storage(url).get_all_studies()


def test_an_empty_storage_is_made_once_by_all_that_start_at_once(new_storage: NewStorage, workers: Callable) -> None:
    urls = [new_storage() for _ in range(8)]
    workers(open_at_once, urls)
    for url in urls:
        assert open_storage(url).get_all_studies() == []


def add_trials(url: str, number: int) -> list[int]:
    """Trials as a worker makes them; each says which process ran it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    barrier.wait()
    storage = open_storage(url)
    with exclusive(url):
        study = optuna.create_study(study_name="shared", storage=storage, load_if_exists=True)
    numbers = []
    for _ in range(number):
        with exclusive(url):
            trial = study.ask()
        trial.set_user_attr("value", trial.suggest_float("x", 0, 1))
        trial.report(trial.params["x"], 1)
        study.tell(trial, trial.params["x"])
        numbers.append(trial.number)
    return numbers


def test_trials_of_several_workers_are_neither_lost_nor_doubled(new_storage: NewStorage, workers: Callable) -> None:
    url = new_storage()
    numbers = workers(add_trials, url, 5)
    assert sorted(itertools.chain(*numbers)) == list(range(5 * WORKERS))
    trials = optuna.load_study(study_name="shared", storage=open_storage(url)).trials
    assert [trial.number for trial in trials] == list(range(5 * WORKERS))
    for trial in trials:
        assert trial.value == trial.user_attrs["value"] == trial.params["x"] == trial.intermediate_values[1]


WRITE = """
import sys
from morphtrain.sweep.storage import open_storage
storage = open_storage(sys.argv[1])
number = storage.create_new_trial(storage.get_study_id_from_name("shared"))
print("writing", flush=True)
for step in range(10**9):
    storage.set_trial_user_attr(number, "text", "x" * 100000)
    storage.set_trial_intermediate_value(number, step, 0.0)
"""


def test_a_writer_that_is_killed_harms_no_other(new_storage: NewStorage) -> None:
    url = new_storage()
    study = optuna.create_study(study_name="shared", storage=open_storage(url))
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITE, url], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "writing\n"
            time.sleep(0.3)
            writer.send_signal(signal.SIGKILL)
        start = time.monotonic()
        study.tell(study.ask(), 1.0)
        assert time.monotonic() - start < 10
    fresh = optuna.load_study(study_name="shared", storage=open_storage(url))
    assert [trial.number for trial in fresh.trials] == list(range(6))
    assert [trial.value for trial in fresh.trials] == [None, 1.0] * 3


def test_half_a_line_in_a_journal_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    url = f"journal:///{path}"
    study = optuna.create_study(study_name="shared", storage=open_storage(url))
    reader = optuna.load_study(study_name="shared", storage=open_storage(url))
    study.tell(study.ask(), 1.0)
    before = path.read_bytes()
    path.write_bytes(before + before.splitlines()[-1][:20])  # a writer died here
    for value in (2.0, 3.0):
        study.tell(study.ask(), value)
    assert path.read_bytes().startswith(before)
    for line in path.read_text().splitlines():
        json.loads(line)
    for storage in (reader, optuna.load_study(study_name="shared", storage=open_storage(url))):
        assert [trial.value for trial in storage.trials] == [1.0, 2.0, 3.0]


def test_a_connection_that_the_server_dropped_is_replaced(postgres: PostgresServer) -> None:
    url = postgres.database()
    storage = open_storage(url)
    name = url.rpartition("/")[2]
    cut = postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    assert len(cut) > 0
    assert storage.get_all_studies() == []


SECRET = "hush"

# The address, and what the message says of it. {here} is an empty directory.
MISTAKES = {
    "unknown scheme": ("mysql://me:hush@host/db", ["=mysql:...", "sqlite:///optuna.db", "postgresql://", "journal:"]),
    "another driver": ("postgresql+psycopg2://me:hush@host/db", ["=postgresql+psycopg2:...", "postgresql://"]),
    "no scheme": ("optuna.db", ["=optuna.db", "sqlite:///optuna.db"]),
    "an @ in the password": ("postgresql://me:hu@hush@host/db", ["%40"]),
    "no host": ("postgresql://me:hush/db", ["not an address"]),
    "no file": ("sqlite://", ["does not name a file", "sqlite:///"]),
    "in memory": ("sqlite:///:memory:", ["does not name a file"]),
    "two slashes": ("journal://study.log", ["does not name a file", "journal:///"]),
    "no directory": ("sqlite:///{here}/none/optuna.db", ["there is no directory {here}/none"]),
    "three slashes of an absolute path": (
        "journal:///dev/study.log",
        ["no directory dev", "journal:////dev/study.log"],
    ),
    "a directory": ("sqlite:///{here}", ["unable to open database file"]),
    "a journal that is none": ("journal:///{here}/text", ["not an Optuna journal"]),
    "a damaged journal": ("journal:///{here}/damaged", ["damaged"]),
    "a database that is none": ("sqlite:///{here}/text", ["file is not a database"]),
    "no server": ("postgresql://me:hush@127.0.0.1:1/db", ["postgresql://me:***@127.0.0.1:1/db", "refused", "start"]),
    "no server, option": (
        "postgresql://127.0.0.1:1/db?password=hush&user=me",
        ["postgresql://127.0.0.1:1/db:", "refused"],
    ),
}


@pytest.mark.parametrize(("url", "parts"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_named_in_a_line(url: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("first line\nand another")
    (tmp_path / "damaged").write_text('{"op_code": 0, \n{}\n')
    before = sorted((path, path.read_text()) for path in tmp_path.iterdir())
    for use in (open_storage, lambda url: exclusive(url).__enter__()):
        if use is not open_storage and url.startswith(("sqlite:///{here}", "journal:///{here}")):
            continue  # the lock does not look into the file
        with pytest.raises(UserError) as caught:
            use(url.format(here=tmp_path))
        said = str(caught.value)
        assert said.startswith("hydra.sweeper.storage=")
        assert "\n" not in said
        assert SECRET not in said
        for part in parts:
            assert part.format(here=tmp_path) in said
    kept = [path for path in tmp_path.iterdir() if path.suffix != ".exclusive"]
    assert sorted((path, path.read_text()) for path in kept) == before


@pytest.mark.parametrize("change", ["password", "database"])
def test_what_the_server_refuses_is_named_without_the_password(change: str, postgres: PostgresServer) -> None:
    refused = {
        "password": postgres.address("postgres", password="hush"),
        "database": postgres.address("nothing_here"),
    }[change]
    with pytest.raises(UserError) as caught:
        open_storage(refused)
    said = str(caught.value)
    assert said.startswith(f"hydra.sweeper.storage=postgresql://postgres:***@127.0.0.1:{postgres.port}/")
    assert change in said.partition("FATAL")[2]
    assert SECRET not in said and "\n" not in said


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"hydra\.sweeper\.storage=.*pip install 'morphtrain\[postgres\]'"):
        open_storage("postgresql://me:hush@127.0.0.1:1/db")


def test_addresses_are_shown_without_passwords(postgres: PostgresServer) -> None:
    shown = without_password(postgres.address("db"))
    assert shown == f"postgresql://postgres:***@127.0.0.1:{postgres.port}/db"
    assert PASSWORD not in shown
    assert without_password("sqlite:///optuna.db") == "sqlite:///optuna.db"


@pytest.mark.parametrize("kind", KINDS)
def test_the_line_for_the_dashboard_shows_our_study_on_this_host_alone(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Optuna's dashboard reads the line; the file's name has a space."""
    if kind == "postgresql":
        address = request.getfixturevalue("postgres").database()
        monkeypatch.setenv("PGPASSWORD", unquote(PASSWORD))
    else:
        address = f"{kind}:///{tmp_path}/my study"
    optuna.create_study(study_name="mine", storage=open_storage(address))
    said = dashboard(address)
    assert PASSWORD not in said and unquote(PASSWORD) not in said
    command, _, more = said.partition("  ")
    assert more == "(then http://127.0.0.1:8080)"
    config = pytest.importorskip("optuna_dashboard._config").DashboardConfig()
    assert (config.host, config.port) == ("127.0.0.1", 8080), "where it listens if nothing else is said"
    from optuna_dashboard._storage_url import get_storage

    name, storage = shlex.split(command)
    assert name == "optuna-dashboard"
    assert [study.study_name for study in get_storage(storage).get_all_studies()] == ["mine"]


def test_a_password_is_left_out_of_the_line_for_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    said = dashboard("postgresql://me:hush@there:5433/db?password=hush&sslmode=require&host=/run/postgres")
    assert "optuna-dashboard 'postgresql+psycopg://me@there:5433/db?host=%2Frun%2Fpostgres'" in said
    assert "hush" not in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dashboard("sqlite:///a.db").startswith("pip install optuna-dashboard; optuna-dashboard sqlite:///a.db  (")


def test_tables_of_another_version_are_a_mistake_too(tmp_path: Path) -> None:
    path = tmp_path / "optuna.db"
    url = f"sqlite:///{path}"
    open_storage(url)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    connection.close()
    with pytest.raises(UserError, match=r"hydra\.sweeper\.storage=.*optuna storage upgrade"):
        open_storage(url)


def test_importing_is_light() -> None:
    look = "import sys, morphtrain.sweep.storage; print(sorted({'torch', 'optuna', 'sqlalchemy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
