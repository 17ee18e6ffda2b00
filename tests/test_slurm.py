"""A real Slurm runs multiruns and sweeps, and requeues some jobs: they end as if nothing had happened.

Slurm lets a requeued job wait for two minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from conftest import SMALL, Command
from mlflow.tracking import MlflowClient
from test_launchers import check_a_sweep_two_by_two
from test_resume import assert_same, contents

pytestmark = pytest.mark.slow
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

SEEDS = (1, 2, 3)
EPOCHS = 60
JOBS = ("-m", *SMALL, f"epochs={EPOCHS}", "seed=1,2,3", "timing.cores=1", "hydra.sweep.dir=jobs")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a running Slurm; skips where none can be started."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.running() as environment:
        yield {**os.environ, **environment}


def wait_for(path: Path, multirun: subprocess.Popen) -> None:
    for _ in range(600):
        if path.exists():
            return
        assert multirun.poll() is None, multirun.communicate()
        time.sleep(0.2)
    raise AssertionError(f"{path} did not come within two minutes")


def test_requeued_jobs_go_on_in_their_directories(slurm: dict[str, str], command: Command, tmp_path: Path) -> None:
    """One job is told that it will be preempted, one is requeued without a word, one is left alone."""
    alone, queued = tmp_path / "alone", tmp_path / "queued"
    for directory in (alone, queued):
        directory.mkdir()
    assert command(*JOBS, cwd=alone).returncode == 0
    with subprocess.Popen(
        [sys.executable, "-m", "morphtrain.run", *JOBS, "+launcher=slurm"],
        cwd=queued,
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as multirun:
        for job, order in enumerate((["scancel", "--signal=USR2"], ["scontrol", "requeue"])):
            wait_for(queued / "jobs" / str(job) / "previous.pt", multirun)
            (folder,) = (queued / "multirun" / ".submitit").glob(f"*_{job}")
            subprocess.run([*order, folder.name], env=slurm, check=True)
        said, _ = multirun.communicate(timeout=600)
    assert multirun.returncode == 0, said
    for job in range(len(SEEDS)):
        directory = queued / "jobs" / str(job)
        assert_same(contents(directory / "last.pt"), contents(alone / "jobs" / str(job) / "last.pt"))
        resumed = "going on after epoch" in (directory / "run.log").read_text()
        assert resumed == (job in (0, 1))
    check_mlflow(queued)


def check_mlflow(directory: Path) -> None:
    """One run a job, FINISHED, with every epoch once."""
    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "morphtrain"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(int(run.data.tags["seed"]) for run in runs) == list(SEEDS)
    for run in runs:
        assert run.info.status == "FINISHED"
        epochs = [metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")]
        assert epochs == list(range(1, EPOCHS + 1))


def test_a_sweep_is_trained_by_job_arrays(slurm: dict[str, str], command: Command, tmp_path: Path) -> None:
    check_a_sweep_two_by_two(command, tmp_path, "+launcher=slurm", env=slurm)


def test_what_slurm_refuses_is_said_without_a_traceback(slurm: dict[str, str], command: Command) -> None:
    result = command("-m", "+launcher=slurm", "hydra.launcher.partition=nowhere", "seed=1,2", env=slurm)
    assert result.returncode == 1
    assert "hydra/launcher: submitit could not run the jobs" in result.stderr
    assert "nowhere" in result.stderr or "partition" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_mistake_in_a_job_is_a_line(slurm: dict[str, str], command: Command) -> None:
    result = command("-m", *SMALL, "+launcher=slurm", "model.width=0,-1", "tracking=none", env=slurm)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "model.width=0: must be 1 or more channels"
    assert "Traceback" not in result.stdout + result.stderr


def test_two_tasks_are_two_processes_of_one_run(slurm: dict[str, str], command: Command, tmp_path: Path) -> None:
    """Both train what `processes=2` trains; a mistake is a line, and nobody waits for anybody then."""
    alone, tasks = tmp_path / "alone", tmp_path / "tasks"
    for directory in (alone, tasks):
        directory.mkdir()
    jobs = ("-m", *SMALL, "seed=1", "timing.cores=1", "hydra.sweep.dir=jobs")
    slurmed = (*jobs, "+launcher=slurm", "hydra.launcher.tasks_per_node=2")
    assert command(*jobs, "processes=2", cwd=alone, env={"OMP_NUM_THREADS": "1"}).returncode == 0
    result = command(*slurmed, cwd=tasks, env=slurm)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(contents(tasks / "jobs" / "0" / "last.pt"), contents(alone / "jobs" / "0" / "last.pt"))
    assert (tasks / "jobs" / "0" / "run.log").read_text().count("epoch    1/6") == 1
    client = MlflowClient(f"sqlite:///{tasks}/mlflow.db")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [(run.info.status, run.data.tags["processes"]) for run in found] == [("FINISHED", "2")]
    result = command(*slurmed, "model.width=0", cwd=tasks, env=slurm)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "model.width=0: must be 1 or more channels"
    assert "Traceback" not in result.stdout + result.stderr
