"""Jobs side by side are the jobs one after the other: `+launcher=joblib`, in a multirun and in a sweep."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from hydra.errors import MissingConfigException
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from morphtrain.evidence.records import read_records
from morphtrain.sweep import launcher_errors
from tests.conftest import SMALL, Command

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")

# The parts of a record that do not depend on the clock or on the process.
SAME = ("epoch", "train_loss", "val_loss", "val_accuracy", "params", "macs", "learning_rate", "batch_size")


def records(directory: Path) -> list[list[list[float]]]:
    """The metrics that have to agree, of every epoch of every job."""
    histories = [read_records(directory / str(job)) for job in range(2)]
    return [[[record[key] for key in SAME] for record in history] for history in histories]


def test_joblib_trains_what_the_basic_launcher_trains(command: Command, tmp_path: Path) -> None:
    jobs = ("-m", *SMALL, "seed=1,2", "tracking=none", "timing.cores=1")
    for launcher in ("local", "joblib"):
        result = command(*jobs, f"+launcher={launcher}", f"hydra.sweep.dir={launcher}")
        assert result.returncode == 0, result.stdout + result.stderr
    assert records(tmp_path / "joblib") == records(tmp_path / "local")


def check_a_sweep_two_by_two(command: Command, directory: Path, *launcher: str, env: dict | None = None) -> None:
    """A sweep of four trials, launched in pairs, has them all in its study and, as runs of a parent, in MLflow."""
    sweep = ("-m", "hydra/sweeper=morphtrain", *SMALL, "optimizer.lr=interval(0.01,0.1)")
    result = command(*sweep, *launcher, "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=4", env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    trials = optuna.load_study(study_name="sweep", storage=f"sqlite:///{directory}/optuna.db").trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert [len(trial.intermediate_values) for trial in trials] == [6, 6, 6, 6], "an objective of every epoch"
    for first, second in (trials[:2], trials[2:]):
        assert first.datetime_complete > second.datetime_start, "a pair ran side by side"
    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    (parent,) = (run.info.run_id for run in runs if "trial" not in run.data.tags)
    for trial in trials:
        (run,) = (run for run in runs if run.data.tags.get("trial") == str(trial.number))
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.data.metrics["train_seconds"] == trial.value


def test_a_sweep_launches_several_trials_at_once(command: Command, tmp_path: Path) -> None:
    check_a_sweep_two_by_two(command, tmp_path, "+launcher=joblib", "hydra.launcher.n_jobs=2")


def test_a_mistake_in_a_job_is_a_line(command: Command) -> None:
    result = command("-m", *SMALL, "+launcher=joblib", "optimizer.lr=-1,-2", "tracking=none")
    assert result.returncode != 0
    assert "optimizer.lr=-1.0: must be" in result.stderr
    assert "Traceback" not in result.stderr.splitlines()[-1]


def test_what_to_install_for_a_launcher_that_is_not_there() -> None:
    error = MissingConfigException("Could not find it", missing_cfg_file="hydra/launcher/submitit_slurm")
    assert launcher_errors.not_installed(error) == (
        "hydra/launcher=submitit_slurm: not installed; pip install 'morphtrain[slurm]'"
    )
    assert launcher_errors.not_installed(MissingConfigException("?", missing_cfg_file="model/nothing")) is None


def test_what_a_launcher_lacks_is_said_without_a_traceback(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    result = command("-m", "+launcher=slurm", "seed=1,2", env={"PATH": str(tmp_path)})
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("hydra/launcher: submitit could not run the jobs: Could not detect")
    assert "Traceback" not in result.stdout + result.stderr
