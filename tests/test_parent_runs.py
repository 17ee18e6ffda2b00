"""The run of a sweep and those of its trials, made by several processes at once or where there is no store."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, Command

from morphtrain import schema
from morphtrain.tracking import __main__ as command_line
from morphtrain.tracking import begin_sweep, end_sweep, ready_view, store, unsent, view

NOWHERE = "http://127.0.0.1:9"

# Six processes that have MLflow imported wait for each other. Each is a sweep of the same study, and a trial of it.
AT_ONCE = """
import multiprocessing, sys, time
from pathlib import Path
from morphtrain import schema
from morphtrain.tracking import begin_sweep, store
from morphtrain.tracking.mlflow import build
import mlflow.store.tracking.sqlalchemy_store

def one(number, barrier):
    barrier.wait()
    config = schema.tracking.MLflow("mlflow", None, "race", 0.0, None)
    parent = begin_sweep(config, "it's \\\\ a study", {}, Path("sweep"))
    tracker = build(schema.tracking.MLflow("mlflow", None, "race", 0.0, parent))
    tags = {"model": "m", "prune": "p", "precision": "o0", "seed": str(number)}
    directory = Path(str(number))
    directory.mkdir()
    tracker.start({"number": number}, tags, directory, resumed=False)
    history = [{"epoch": e, "timestamp": time.time(), "epoch_seconds": 0.1 * e} for e in range(1, 6)]
    for epoch in range(1, 6):
        tracker.update(history[:epoch])
    tracker.finish("FINISHED", history)

if __name__ == "__main__":
    store.load_mlflow()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(6)
    processes = [context.Process(target=one, args=(number, barrier)) for number in range(6)]
    for process in processes: process.start()
    for process in processes: process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
"""


def rows(directory: Path, sql: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(directory / "mlflow.db")) as database:
        return database.execute(sql).fetchall()


def config(uri: str | None = None) -> schema.tracking.MLflow:
    return schema.tracking.MLflow("mlflow", uri, "sweeps", 0.0, None)


@pytest.mark.parametrize("repeat", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 21))])
def test_six_processes_at_once_make_one_database_one_experiment_and_one_parent(repeat: int, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", AT_ONCE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "failed" not in result.stderr, result.stderr
    assert "no parent" not in result.stderr, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", *map(str, range(6))}, "nothing half made is left"
    assert rows(tmp_path, "SELECT name FROM experiments ORDER BY experiment_id") == [("Default",), ("race",)]
    ((parent,),) = rows(tmp_path, "SELECT run_uuid FROM tags WHERE key = 'sweep_dir'")
    children = rows(tmp_path, f"SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = '{parent}'")
    assert len(children) == 6
    assert rows(tmp_path, "SELECT count(*) FROM runs") == [(7,)]
    epochs = rows(tmp_path, "SELECT run_uuid, count(*), count(DISTINCT step) FROM metrics GROUP BY run_uuid")
    assert sorted(epochs) == sorted((child, 5, 5) for (child,) in children)
    assert rows(tmp_path, f"SELECT DISTINCT status FROM runs WHERE run_uuid != '{parent}'") == [("FINISHED",)]


def test_an_experiment_that_another_process_makes_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    asked = MlflowClient.get_experiment_by_name

    def another_is_faster(client: MlflowClient, name: str) -> None:
        monkeypatch.undo()
        assert asked(client, name) is None
        client.create_experiment(name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", another_is_faster)
    _, experiment_id = store.connect(uri, "race")
    assert rows(tmp_path, "SELECT experiment_id FROM experiments WHERE name = 'race'") == [(int(experiment_id),)]


def test_a_study_keeps_its_parent_and_its_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    first = begin_sweep(config(), "it's \\ a study", {"device": "cpu"}, tmp_path / "sweep")
    assert first is not None
    other = begin_sweep(config(), "another", {}, tmp_path / "sweep")
    assert other not in (None, first)
    (tmp_path / "best.txt").write_text("best")
    end_sweep(config(), first, {"best": 2.0}, {"trials": 10, "best": "a"}, [tmp_path / "best.txt"], "KILLED")

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(first).info.status == "KILLED"
    assert begin_sweep(config(), "shown", {"study": "it's \\ a study", "device": "cuda"}, tmp_path / "later") == first
    assert client.get_run(first).info.status == "RUNNING"
    end_sweep(config(), first, {"best": 1.0}, {"trials": 20, "more": 1}, [], "FINISHED")
    run = client.get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"best": 1.0}
    assert run.data.params == {"trials": "10", "best": "a", "more": "1"}
    assert run.data.tags["device"] == "cuda"
    assert run.data.tags["study"] == "it's \\ a study"
    assert [file.path for file in client.list_artifacts(first)] == ["best.txt"]


def test_without_a_store_a_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert begin_sweep(schema.tracking.Tracking("none"), "s", {}, tmp_path) is None
    assert caplog.text == ""
    assert begin_sweep(config(NOWHERE), "s", {}, tmp_path) is None
    assert caplog.text.count("no parent run for the sweep") == 1
    end_sweep(config(NOWHERE), "0" * 32, {"best": 1.0}, {}, [], "FINISHED")
    assert "failed" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_outcome_of_a_sweep_is_kept_for_an_absent_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    run_id = begin_sweep(config(), "s", {}, tmp_path)
    assert run_id is not None
    (tmp_path / "best.txt").write_text("best")
    end_sweep(config(NOWHERE), run_id, {"best": 1.0}, {"trials": 3}, [tmp_path / "best.txt"], "FINISHED", tmp_path)
    record = unsent.read(tmp_path)
    assert record is not None
    for _ in range(2):
        assert command_line.main([str(tmp_path), "--uri", "sqlite:///mlflow.db"]) == 0  # the store has moved
        unsent.write(record, tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "best")] == [(1, 1.0)]
    assert run.data.params == {"trials": "3"}
    assert [file.path for file in client.list_artifacts(run_id)] == ["best.txt"]


def test_a_study_ends_with_a_view_of_its_runs_and_of_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    study = "it's \\ a study"
    parent = begin_sweep(config(), study, {}, tmp_path / "sweep")
    assert parent is not None
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    trials = []
    for name, lr, prune in (("a", "0.1", "none"), ("b", "0.2", "early"), ("of another study", "0.3", "morphnet")):
        tags = {"study": study if name != "of another study" else name, "prune": prune, "data": "digits"}
        run = client.create_run("1", tags={**tags, "mlflow.parentRunId": parent})
        params = {"optimizer.lr": lr, "epochs": "3", "trial": name, "prune.name": prune, "prune.by": "0.5"}
        for key, value in params.items():
            client.log_param(run.info.run_id, key, value)
        trials.append(run.info.run_id)
    directory = tmp_path / "a sweep"
    end_sweep(config(), parent, {"best": 1.0}, {"objective": ["macs", "eval_seconds"]}, [], "FINISHED", directory)
    tags = client.get_experiment("1").tags
    (tag,) = (key for key in tags if key.startswith(view.TAG))
    path = f"/#/experiments/1/runs?viewStateShareKey={tag.removeprefix(view.TAG)}"
    assert "in MLflow: python -m morphtrain.ui 'a sweep'\n" in caplog.text
    saved = json.loads(tags[tag])
    assert saved["name"] == study
    state = json.loads(saved["state"])
    metrics = ["macs", "eval_seconds", "val_accuracy", "train_seconds", "params"]
    columns = [*(f"metrics.`{name}`" for name in metrics), "tags.`prune`", "params.`optimizer.lr`"]
    assert state["selectedColumns"] == columns
    found = {run.info.run_id for run in client.search_runs(["1"], state["searchFilter"])}
    assert found == {parent, *trials[:2]}
    assert ready_view(None, "sweeps", study) == path, "the same view, written again"
    assert ready_view(None, "sweeps") == "/#/experiments/1/runs?viewStateShareKey=all"
    assert len([key for key in client.get_experiment("1").tags if key.startswith(view.TAG)]) == 2


def test_a_trial_hangs_below_its_parent_and_a_plain_multirun_below_none(command: Command, tmp_path: Path) -> None:
    here = [*SMALL, "epochs=2", "hydra.run.dir=run"]
    assert command(*here, "tracking.parent_run_id=abc").returncode == 0
    assert rows(tmp_path, "SELECT value FROM tags WHERE key = 'mlflow.parentRunId'") == [("abc",)]
    resumed = command(*here, "tracking.parent_run_id=abd", "resume=auto")
    assert resumed.returncode == 0, "the parent may change: it does not change what is computed"
    assert rows(tmp_path, "SELECT count(*) FROM runs") == [(1,)]
