"""`morphtrain.ui`: MLflow's UI opens on what a run recorded, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SMALL, Command
from fork_server import ForkServer
from omegaconf import OmegaConf

from morphtrain import ui
from morphtrain.errors import UserError
from morphtrain.tracking import recorded, store, ui_server, view
from morphtrain.tracking.ui_server import free_port

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Callable[..., Path]:
    """Makes the directory of a run as Hydra leaves it."""

    def make(place: str, started: Path, run_dir: str = "", **tracking: str | None) -> Path:
        hydras = tmp_path / place / ".hydra"
        hydras.mkdir(parents=True)
        OmegaConf.save({"hydra": {"runtime": {"cwd": str(started), "output_dir": run_dir}}}, hydras / "hydra.yaml")
        tracked = {"name": "mlflow", "uri": None, **tracking}
        OmegaConf.save({"tracking": tracked, "objective": ["macs"]}, hydras / "config.yaml")
        return tmp_path / place

    return make


@pytest.fixture(autouse=True)
def no_store_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_store_of_a_run_is_found(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert recorded.recorded(run_dir("plain", home)).uri == f"sqlite:///{home}/mlflow.db"
    assert recorded.recorded(run_dir("own", home, uri="sqlite:///own.db")).uri == f"sqlite:///{home}/own.db"
    assert recorded.recorded(run_dir("far", home, uri="sqlite:////there/my.db")).uri == "sqlite:////there/my.db"
    run_dir("sweep/3", home)
    assert recorded.recorded(tmp_path / "sweep").uri == f"sqlite:///{home}/mlflow.db"


def test_the_environment_says_where_runs_without_a_key_went(
    run_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, own = run_dir("plain", tmp_path), run_dir("own", tmp_path, uri="sqlite:///own.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert recorded.recorded(plain).uri == "http://127.0.0.1:5000"
    assert recorded.recorded(own).uri == f"sqlite:///{tmp_path}/own.db"


def test_a_received_directory_leads_to_no_other_place(
    run_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "my-secret")
    for number, uri in enumerate(
        ("http://elsewhere/", "postgresql://elsewhere/x", "http://elsewhere/${oc.env:SECRET}")
    ):
        with pytest.raises(UserError, match=r"recorded to .*elsewhere.*; --uri shows another store") as refused:
            recorded.recorded(run_dir(str(number), tmp_path, uri=uri))
        assert "my-secret" not in str(refused.value)
    for name in ("none", "csv", "tensorboard"):
        with pytest.raises(UserError, match=rf"recorded nothing in MLflow \(tracking={name}\)"):
            recorded.recorded(run_dir(name, tmp_path, name=name))
    with pytest.raises(UserError, match="empty: no run is there"):
        recorded.recorded(tmp_path / "empty")
    broken = run_dir("broken", tmp_path)
    (broken / ".hydra" / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: damaged"):
        recorded.recorded(broken)


def test_the_directory_of_a_sweep_opens_on_the_view_of_its_study(
    run_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it is now, and whichever run of it is found; a single run opens on MLflow's own page."""
    monkeypatch.chdir(tmp_path)
    client, experiment_id = store.connect(f"sqlite:///{tmp_path}/mlflow.db", "mine")
    for place, study in (("sweep/0", "s"), ("sweep/confirm-1/3/plain", "s confirm-1"), ("single", "none")):
        made = run_dir(place, tmp_path, experiment="mine", run_dir=f"/there/{place}")
        if place != "sweep/0":
            client.create_run(experiment_id, tags={"run_dir": f"/there/{place}", "study": study})
        else:
            client.create_run(experiment_id, tags={"run_dir": str(made), "study": "of others there"})
            client.create_run(experiment_id, tags={"run_dir": f"/there/{place}", "study": study})
    run_dir("elsewhere", tmp_path, experiment="not there", run_dir="/there/sweep/0")
    opened: list[str] = []
    monkeypatch.setattr(ui_server, "serve", lambda uri, port, page: opened.append(page))

    def views() -> list[str]:
        return [tag for tag in client.get_experiment(experiment_id).tags if tag.startswith(view.TAG)]

    for place in ("single", "elsewhere"):
        ui._show(ui.parse([place]))
    assert (opened, views()) == (["/", "/"], [])
    assert [experiment.name for experiment in client.search_experiments()] == ["mine", "Default"]
    for place in ("sweep", "sweep/0"):
        ui._show(ui.parse([place]))
    (tag,) = views()
    assert opened[2:] == [f"/#/experiments/{experiment_id}/runs?viewStateShareKey={tag.removeprefix(view.TAG)}"] * 2
    saved = json.loads(client.get_experiment(experiment_id).tags[tag])
    assert saved["name"] == "s"
    assert json.loads(saved["state"])["selectedColumns"][0] == "metrics.`macs`", "the objective"
    monkeypatch.setattr(view, "ready_view", lambda *_: 1 / 0)
    ui._show(ui.parse(["sweep"]))
    assert opened[4:] == ["/"]
    assert "no view of the study: " in capsys.readouterr().out


def test_where_nothing_is_recorded_nothing_is_made(fork_server: ForkServer, tmp_path: Path) -> None:
    def ui(*words: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
        result = fork_server.run(["-m", "morphtrain.ui", *words], tmp_path, env)
        return result.returncode, result.stdout, result.stderr

    wanted = "a run makes one where it is started; a run's directory or --uri names another"
    assert ui() == (1, "", f"{tmp_path}/mlflow.db: nothing has been recorded there; {wanted}\n")
    (tmp_path / "mlflow.db").touch()
    assert ui() == (1, "", f"{tmp_path}/mlflow.db: no store of MLflow's\n")
    (tmp_path / "text.db").write_text("some text, and no database\n" * 99)
    assert ui("--uri", "sqlite:///text.db") == (1, "", f"{tmp_path}/text.db: file is not a database\n")
    assert ui(".") == (1, "", ".: no run is there; a run leaves its directory in outputs/ or multirun/\n")
    assert ui(".", "--uri", "sqlite:///x.db")[0] == 2
    assert ui("--prot", "1") == (2, "", "--prot: no such flag; did you mean --port?\n")
    code, said, _ = ui(env={"MLFLOW_TRACKING_URI": "http://me:secret@127.0.0.1:1"})
    assert (code, said.split(" ")[0]) == (0, "http://me:***@127.0.0.1:1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "text.db"]
    assert (tmp_path / "mlflow.db").stat().st_size == 0


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port < free_port(port) <= port + 99
    assert free_port(port) == port
    with pytest.raises(UserError, match="--port 65536"):
        free_port(65536)


def test_what_shows_a_store_is_a_command_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["morphtrain run"])
    assert store.view(f"sqlite:///{tmp_path}/mlflow.db") == "morphtrain ui"
    assert store.view("sqlite:////else where/a.db") == "morphtrain ui --uri 'sqlite:////else where/a.db'"
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////there/a.db")
    assert store.view("sqlite:////there/a.db") == "python -m morphtrain.ui"


def test_help_waits_for_nothing_slow() -> None:
    line = [sys.executable, "-X", "importtime", "-m", "morphtrain.ui", "--help"]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    assert not re.search(r"\| +(torch|mlflow|hydra)$", result.stderr, re.MULTILINE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command, which is given the time that MLflow takes; what is left of it at the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def ui(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "morphtrain.ui", *words]
        started.append(
            subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        return started[-1]

    yield ui
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def address_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the command says before the address, and the address."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        if line.startswith("http"):
            return said, line.split()[0]
        said += line
    raise AssertionError(said)


def get(address: str, body: dict | None = None) -> bytes:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener().open(request, timeout=10) as answer:  # urlopen leaves its own to all tests
        return answer.read()


def served(port: int) -> list[int]:
    """The processes that have a port in their command line, as the server's have."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"--port\0{port}\0".encode() in place.read_bytes():
                found.append(int(place.parent.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_ui_opens_on_the_runs_and_leaves_no_process(
    number: int, command: Command, start: Start, tmp_path: Path
) -> None:
    assert command(*SMALL, "epochs=2", "hydra.run.dir=run").returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = taken.getsockname()[1]
        process = start("run", "--port", str(wanted))
        said, address = address_of(process)
    port = int(address.rstrip("/").rpartition(":")[2])
    assert f"port {wanted} is taken; {port} is free" in said
    assert f"sqlite:///{tmp_path}/mlflow.db" in said
    assert b"MLflow" in get(address)
    experiments = json.loads(get(f"{address}api/2.0/mlflow/experiments/search", {"max_results": 10}))["experiments"]
    (ours,) = [e for e in experiments if e["name"] == "morphtrain"]
    runs = json.loads(get(f"{address}api/2.0/mlflow/runs/search", {"experiment_ids": [ours["experiment_id"]]}))["runs"]
    (run,) = runs
    assert {"val_accuracy", "train_seconds"} <= {metric["key"] for metric in run["data"]["metrics"]}
    assert len(served(port)) >= 2, "the command has none, the server and MLflow do"
    process.send_signal(number)
    code = process.wait(10)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    end = time.monotonic() + 5
    while served(port) and time.monotonic() < end:
        time.sleep(0.05)
    assert served(port) == []


@pytest.mark.slow
def test_a_server_that_cannot_start_says_so(start: Start, tmp_path: Path) -> None:
    """A store of a later MLflow's, which this one refuses."""
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("CREATE TABLE experiments (x INTEGER)")
        database.execute("CREATE TABLE runs (x INTEGER)")
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('later')")
    database.close()
    process = start()
    assert process.wait(60) == 1
