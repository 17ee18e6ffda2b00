"""Sweeps through the real command: resumed, stopped early, with failing trials, with one objective and with two."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlflow
import optuna
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from mlflow.entities import Run
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from morphtrain import schema
from morphtrain.arguments import prepared
from morphtrain.errors import UserError
from morphtrain.schema.names import keys_of_file
from morphtrain.schema.sweeper import study_name
from morphtrain.sweep.single_run import as_override, single_run
from morphtrain.sweep.storage import open_storage
from morphtrain.sweep.trial import TrialReporter
from tests.conftest import KILLED_RUN, SMALL, Command
from tests.fork_server import ForkServer

SWEEP = (
    *("-m", "hydra/sweeper=morphtrain", "hydra.sweep.dir=sweep", "tracking=none"),
    *("data=synthetic", "data.train_samples=256", "data.val_samples=64", "data.image_size=8"),
    *("model.blocks=1", "batch_policy.batch_size=16", "epochs=3"),
)


def trials_in(directory: Path, name: str = "sweep") -> list[FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{directory}/optuna.db").trials


def states(trials: list[FrozenTrial]) -> Counter[str]:
    return Counter(trial.state.name for trial in trials)


def runs_in(directory: Path) -> dict[int, Run]:
    """MLflow's runs of trials, by number."""
    client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [run for run in client.search_runs(experiments) if "trial" in run.data.tags]
    numbered = {int(run.data.tags["trial"]): run for run in runs}
    assert len(numbered) == len(runs)
    return numbered


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "interrupted"])
def test_a_sweep_that_was_ended_goes_on_to_its_total(
    ended_by: signal.Signals, command: Command, fork_server: ForkServer, tmp_path: Path
) -> None:
    sweep = ("-m", "+sweep=prunetrain", *SMALL, "hydra.sweeper.n_trials=5", "hydra.sweeper.min_accuracy=null")
    sweep += ("timing.reference=0",)  # its workload takes steps, too
    in_the_third = f"step:{16 * (2 * 6 + 3)}:{ended_by.name.removeprefix('SIG')}"  # of trials of 6 epochs of 16 steps
    first = fork_server.run([KILLED_RUN, in_the_third, *sweep], tmp_path)
    assert first.returncode == (-signal.SIGKILL if ended_by == signal.SIGKILL else 128 + ended_by), first.stderr
    before = trials_in(tmp_path, "prunetrain")
    assert [trial.number for trial in before] == [0, 1, 2]
    assert before[2].state == (TrialState.RUNNING if ended_by == signal.SIGKILL else TrialState.WAITING)

    second = command(*sweep)
    assert second.returncode == 0, second.stdout + second.stderr
    trials = trials_in(tmp_path, "prunetrain")
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert states(trials) == {"COMPLETE": 5}
    assert not list((tmp_path / "multirun/prunetrain").glob(".worker-*")), "nor what the killed one left"
    assert trials[2].params == before[2].params, "it is the same trial that goes on"
    assert "going on after epoch" in second.stdout
    # of calibrated times if others have disturbed a trial
    (importance,) = (line for line in second.stdout.splitlines() if line.startswith("importance for "))
    assert all(key in importance for key in trials[1].params)
    runs = runs_in(tmp_path)
    assert sorted(runs) == [0, 1, 2, 3, 4]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for trial in trials:
        run = runs[trial.number]
        assert run.info.status == "FINISHED"
        assert run.info.run_name.startswith(f"trial {trial.number}: ")
        assert run.data.metrics["train_seconds"] == pytest.approx(trial.values[0])
        assert [m.step for m in client.get_metric_history(run.info.run_id, "train_seconds")] == list(range(1, 7))
        assert all(run.data.params[key] == str(value) for key, value in trial.params.items())
    assert runs[0].data.params["prune.name"] == "none", "trial 0 is the baseline"
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs.values()}
    assert client.get_run(parent).info.status == "FINISHED"
    assert client.get_run(parent).data.metrics["trials_complete"] == 5
    assert {file.path for file in client.list_artifacts(parent)} >= {"history.png", "optimization_results.yaml"}
    for name in ("history.png", "parallel.png", "slices.png", "importance.png", "optimization_results.yaml"):
        assert (tmp_path / "multirun/prunetrain" / name).stat().st_size > 0

    again = command(*sweep)
    assert again.returncode == 0
    assert len(trials_in(tmp_path, "prunetrain")) == 5, "n_trials is of the whole study"


def test_the_command_of_the_winner_trains_what_it_trained(
    command: Command, fork_server: ForkServer, tmp_path: Path
) -> None:
    space = ("model.width=4,6", "optimizer.lr=interval(0.05,0.1)", "objective=[macs]")
    result = command(*SWEEP, *space, "hydra.sweeper.n_trials=4", "hydra/sweeper/sampler=random")
    assert result.returncode == 0, result.stdout + result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("to run the best trial again:"))
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    python, *arguments = shlex.split(line.split(":", 1)[1])
    assert python == "python"
    again = fork_server.run([*arguments, "objective=[params]"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert best["best_value"] == min(trial.values[0] for trial in trials_in(tmp_path))
    number = next(t.number for t in trials_in(tmp_path) if t.values[0] == best["best_value"])
    log = (tmp_path / f"sweep/{number}/run.log").read_text()
    then, now = (
        [line.split("epoch ")[1] for line in text.splitlines() if "loss" in line] for text in (log, again.stdout)
    )
    assert [line.split("val_accuracy")[0] for line in then] == [line.split("val_accuracy")[0] for line in now] != []


TRIALS = {
    "batch": ["batch_policy.batch_size=64", "norm=ghost", "optimizer.lr=0.1"],
    "everything": ["prune=prunetrain", "prune.lasso_ratio=3.0"],
    "fastest": ["prune=prunetrain", "prune.interval=2", "epochs=2", "timing.target_accuracy=0.9"],
    "fastest, baseline": ["prune=none", "epochs=1"],
    "growth": ["grow=deeper", "grow.patience=3", "model.width=6"],
    "growth, baseline": ["grow=none", "model.width=16"],
    "pareto": ["prune.lasso_ratio=3.0", "optimizer.lr=0.1"],
    "precision": ["precision=bf16", "optimizer.lr=0.1"],
    "prunetrain": ["prune.lasso_ratio=3.0", "prune.threshold=0.001"],
    "prunetrain, baseline": ["prune=none"],
}


@pytest.mark.parametrize("case", TRIALS)
def test_a_trial_of_a_preset_is_repeated_by_a_single_run(case: str) -> None:
    """The preset's options and keys are spelled out: it would make a sweep of the command."""
    name = case.partition(",")[0]
    assert {path.stem for path in (schema.CONF / "sweep").glob("*.yaml")} == {key.partition(",")[0] for key in TRIALS}
    trial = [f"+sweep={name}", "epochs=3", "+launcher=joblib", *TRIALS[case]]
    with initialize_config_dir(str(schema.CONF)):
        alone = single_run(trial, GlobalHydra.instance().config_loader(), "config")
        assert prepared(alone) == alone, "which makes no multirun of it"
        assert compose("config", alone) == compose("config", [*trial, "hydra.mode=RUN"])


@pytest.mark.parametrize("value", [None, True, "null", "a b", "it's", "1", "[x]", 0.5, 3, ["a", "b/c"], {"a": ["x"]}])
def test_a_value_is_spelled_as_the_command_line_takes_it(value: object) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([f"key={as_override(value)}"])
    assert parsed.value() == value


@pytest.mark.parametrize(
    ("typed", "several"),
    [
        (["+sweep=batch"], True),
        (["epochs=3", "hydra/sweeper=morphtrain"], True),
        (["+launcher=slurm"], True),
        (["hydra.mode=RUN", "+sweep=batch"], False),
        (["epochs=3"], False),
    ],
)
def test_what_only_a_multirun_can_do_makes_one(typed: list[str], several: bool) -> None:
    assert prepared(typed) == [*typed, *["hydra.mode=MULTIRUN"] * several]


def test_a_grid_of_options_takes_the_keys_that_all_of_them_have() -> None:
    grid = ["-m", "prune=morphnet,prunetrain", "seed=1,2"]
    outermost = ["-m", "seed=1,2", "prune=morphnet,prunetrain"]
    assert prepared([*grid, "prune.interval=1,2"]) == [*outermost, "++prune.interval=1,2"], (
        "the default, none, lacks it"
    )
    unknown = ["-m", "prune=prunetrain,custom,mine", "prune.interval=1"]
    assert prepared(unknown) == unknown, "nobody knows what keys one's own parts have"
    for path in schema.CONF.glob("*/*.yaml"):
        if path.parent.name in schema.OPTIONS and path.stem != "custom":
            assert keys_of_file(path.parent.name, path.stem) is not None, path


@pytest.mark.parametrize("seeds", ["seed=1,2,3", "seed=range(1,4)", "seed=choice(1,2,3)"])
def test_all_configurations_of_a_seed_run_side_by_side(seeds: str) -> None:
    """Jobs as Hydra's own sweeper numbers them; a further seed leaves the numbers of those before it."""

    def jobs(*typed: str) -> list[list[str]]:
        given = [argument for argument in prepared(["-m", *typed]) if argument != "-m"]
        parsed = OverridesParser.create().parse_overrides(given)
        (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [list(job) for job in batch]

    found = jobs("prune=none,prunetrain", "epochs=2", seeds)
    assert [job[0] for job in found] == [f"seed={seed}" for seed in (1, 1, 2, 2, 3, 3)]
    assert [job[1] for job in found] == ["prune=none", "prune=prunetrain"] * 3
    assert found == jobs(seeds, "prune=none,prunetrain", "epochs=2")
    assert jobs("prune=none,prunetrain", "epochs=2", "seed=1,2,3,4")[:6] == found
    assert prepared(["epochs=2", "seed=3"]) == ["epochs=2", "seed=3"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["-m", "prune=none,prunetrain", "--cfg", "job"], "leave out -m and give each key one value"),
        (["+experiment=lasso_ratio", "-m", "--cfg=job"], "leave out -m"),
        (["+experiment=lasso_ratio", "--cfg", "job"], "--cfg hydra --package hydra.sweeper shows its declaration"),
    ],
)
def test_a_config_of_several_runs_is_not_shown(typed: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        prepared(typed)
    assert "\n" not in str(refused.value)


def test_a_study_may_be_called_what_yaml_takes_for_something_else(command: Command, tmp_path: Path) -> None:
    """Also without `-m`, which a sweeper implies."""
    space = ("model.width=4,6", "hydra.sweeper.study_name=1", "hydra.sweeper.n_trials=1", "epochs=1")
    result = command(*SWEEP[1:], *space, "hydra.sweeper.baseline=null")
    assert result.returncode == 0, result.stdout + result.stderr
    assert states(trials_in(tmp_path, "1")) == {"COMPLETE": 1}
    for name in (True, 1, float("inf"), "null"):
        assert study_name(OmegaConf.create({"study_name": name})) == str(name)


def test_trials_behind_the_median_are_stopped(command: Command, tmp_path: Path) -> None:
    """The objective is the number of MACs: from the second trial on, the wider ones are behind at every epoch."""
    space = ("model.width=4,6,8,10,12", "objective=[macs]", "hydra/sweeper/sampler=grid")
    early = ("hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=2")
    sweep = [key for key in (*SWEEP, *early) if key != "tracking=none"]
    result = command(*sweep, *space, "hydra.sweeper.pruner.n_warmup_steps=1")
    assert result.returncode == 0, result.stdout + result.stderr
    trials = trials_in(tmp_path)
    assert len(trials) == 6
    assert trials[0].state == TrialState.COMPLETE, "the baseline trains to its end, though all others are narrower"
    assert states(trials)["PRUNED"] >= 1
    runs = runs_in(tmp_path)
    best_so_far = []
    for trial in trials:
        epochs = len(trial.intermediate_values)
        assert runs[trial.number].info.status == ("KILLED" if trial.state == TrialState.PRUNED else "FINISHED")
        if trial.state == TrialState.PRUNED:
            assert epochs < 3
            assert len(best_so_far) >= 2
            assert trial.values[0] > min(best_so_far)
        else:
            assert epochs == 3
            best_so_far.append(trial.values[0])


@pytest.mark.parametrize("objective", ["train_seconds", "calibrated_train_seconds", "val_loss"])
def test_a_trial_is_stopped_once_it_is_slower(objective: str, tmp_path: Path) -> None:
    """A clock only ever grows: the best value of a trial, which Optuna goes by, would be the first epoch's for good."""
    storage = f"sqlite:///{tmp_path}/optuna.db"
    study = optuna.create_study(study_name="early", storage=open_storage(storage))
    for _ in range(3):
        trial = study.ask()
        for epoch in (1, 2, 3):
            trial.report(float(epoch), epoch)
        study.tell(trial, 3.0)
    pruner = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 3, "n_warmup_steps": 0}
    sweeper = OmegaConf.create({"study_name": "early", "storage": storage, "pruner": pruner})

    def verdicts(*values: float, epochs: int = 9, **more: float) -> list[bool]:
        reporter = TrialReporter(sweeper, study.ask().number, [objective], epochs)
        return [reporter({"epoch": epoch, objective: value, **more}) for epoch, value in enumerate(values, 1)]

    assert verdicts(0.9, 1.8, 2.7) == [False, False, False]
    assert verdicts(1.1) == [True]
    assert verdicts(1.1, epochs=1) == [False], "it has its result: there is nothing to save"
    assert verdicts(1.1, stopped_early=1.0) == [False]
    assert verdicts(0.5, 2.5, 2.9) == [False, objective != "val_loss", False]


def test_a_failed_trial_does_not_end_the_sweep(command: Command, tmp_path: Path) -> None:
    space = ("optimizer.lr=0.05,1e30,0.1", "hydra/sweeper/sampler=grid")
    result = command(*SWEEP, *space)
    assert result.returncode == 0, result.stdout + result.stderr
    trials = trials_in(tmp_path)
    assert states(trials) == {"COMPLETE": 3, "FAIL": 1}
    failed = next(trial for trial in trials if trial.state == TrialState.FAIL)
    assert failed.params == {"optimizer.lr": 1e30}
    assert "optimizer.lr=1e+30: training diverged" in failed.user_attrs["error"]
    assert f"trial {failed.number} failed: optimizer.lr=1e+30" in result.stdout + result.stderr


def test_too_many_failures_end_it(command: Command, tmp_path: Path) -> None:
    space = ("optimizer.lr=1e30,1e31,1e32,1e33", "hydra.sweeper.baseline=null")
    result = command(*SWEEP, *space, "hydra.sweeper.n_trials=9")
    assert result.returncode == 1
    assert "hydra.sweeper.max_failure_rate=0.5: 4 of 4 trials failed" in result.stderr
    assert "Traceback" not in result.stderr
    assert states(trials_in(tmp_path)) == {"FAIL": 4}


def test_options_that_exclude_one_another_take_a_trial_and_no_more(command: Command, tmp_path: Path) -> None:
    """Also where they are what ends all ranges, by which a search is checked, and are more than may fail."""
    space = ("batch_policy=fixed,fill_memory", "model.width=4,6", "device=cpu", "hydra/sweeper/sampler=grid")
    result = command(*SWEEP, *space, "epochs=1", "hydra.sweeper.max_failure_rate=0.1")
    assert result.returncode == 0, result.stdout + result.stderr
    trials = trials_in(tmp_path)
    assert states(trials) == {"COMPLETE": 3, "FAIL": 2}
    for trial in trials:
        if trial.state == TrialState.FAIL:
            assert trial.params["batch_policy"] == "fill_memory"
            assert trial.user_attrs["error"].startswith("batch_policy.budget=null with device=cpu: only a CUDA device")


def test_two_objectives_and_a_constraint(command: Command, tmp_path: Path) -> None:
    two = ("objective=[macs,val_accuracy]", "hydra.sweeper.direction=[minimize,maximize]")
    space = ("model.width=4,8", "optimizer.lr=interval(0.05,0.1)", "hydra/sweeper/sampler=nsgaii")
    result = command(*SWEEP, *two, *space, "hydra.sweeper.n_trials=3", "hydra.sweeper.min_accuracy=0.05")
    assert result.returncode == 0, result.stdout + result.stderr
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/optuna.db")
    assert {len(trial.values) for trial in study.trials} == {2}
    for trial in study.trials:
        assert trial.constraints["val_accuracy"] == pytest.approx(0.05 - trial.values[1])
    stored = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert len(stored["solutions"]) == len(study.best_trials) >= 1
    assert (tmp_path / "sweep/pareto.png").exists()


def test_when_nothing_is_accurate_enough_that_is_reported(command: Command) -> None:
    space = ("model.width=4,8", "hydra.sweeper.min_accuracy=1")
    result = command(*SWEEP, *space, "epochs=1", "hydra.sweeper.n_trials=2", "optimizer.lr=1e-9")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no trial is feasible" in result.stdout


WRONG = {
    "options that exclude one another in every trial": (
        ["model.width=4,8", "batch_policy=fill_memory", "device=cpu"],
        "batch_policy.budget=null with device=cpu: only a CUDA device says",
    ),
    "key": (["optimizer.lrr=0.1,0.2"], "optimizer.lrr"),
    "value": (["optimizer.lr=interval(-1.0,0.2)"], "optimizer.lr=-1.0: must be"),
    "nothing": ([], "hydra.sweeper.params={}: must be what to search"),
    "directions": (
        ["model.width=4,8", "objective=[macs,val_accuracy]"],
        "hydra.sweeper.direction=['minimize']: objective=['macs', 'val_accuracy'] has 2 metrics",
    ),
    "pruner": (
        [
            "model.width=4,8",
            "objective=[macs,val_accuracy]",
            "hydra.sweeper.direction=[minimize,maximize]",
            "hydra/sweeper/pruner=median",
        ],
        "hydra/sweeper/pruner=none works",
    ),
    "grid": (
        ["optimizer.lr=interval(0.1,0.2)", "hydra/sweeper/sampler=grid"],
        "a grid needs choices or a range with steps",
    ),
    "trials": (["model.width=4,8", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0"),
    "baseline": (
        ["model.width=4,8", "hydra.sweeper.baseline=[prune=nun]"],
        "prune",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_found_before_the_first_trial(case: str, command: Command, tmp_path: Path) -> None:
    overrides, message = WRONG[case]
    result = command(*SWEEP, *overrides)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_study_of_something_else_is_not_continued(command: Command, tmp_path: Path) -> None:
    space = ("model.width=4,8", "hydra.sweeper.n_trials=2")
    assert command(*SWEEP, *space, "epochs=1").returncode == 0
    result = command(*SWEEP, *space, "epochs=2")
    assert result.returncode == 1
    assert "hydra.sweeper.study_name=sweep: its trials have overrides=" in result.stderr
    assert "epochs=1" in result.stderr
    result = command(*SWEEP, *space, "epochs=1", "hydra.sweeper.min_accuracy=0.1")
    assert "its trials have min_accuracy=null, which cannot be compared with 0.1" in result.stderr
    assert len(trials_in(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_two_workers_share_a_study_and_one_is_killed(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    journal = f"journal:///{tmp_path}/study.log"
    storage = journal if kind == "journal" else request.getfixturevalue("postgres").database()
    sweep = (*SWEEP, "model.width=4", "optimizer.lr=interval(0.01,0.1)", "hydra.sweeper.n_trials=10", "epochs=2")
    command = [sys.executable, "-m", "morphtrain.run", *sweep, "hydra.sweeper.storage='${oc.env:STUDY}'"]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "env": {**os.environ, "STUDY": storage}}
    victim, other = subprocess.Popen(command, **quiet), subprocess.Popen(command, **quiet)
    while not (tmp_path / "sweep/3/last.pt").exists():
        assert victim.poll() is None
        assert other.poll() is None
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    assert other.wait(300) == 0
    trials = optuna.load_study(study_name="sweep", storage=open_storage(storage)).trials
    assert [trial.number for trial in trials] == list(range(10))
    assert states(trials) == {"COMPLETE": 10}
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 10
    assert {int(path.parent.name) for path in tmp_path.glob("sweep/*/last.pt")} == set(range(10))


def test_help_and_cfg_do_not_load_optuna() -> None:
    code = (
        "import sys; sys.argv = ['run', '--cfg', 'job', '+sweep=prunetrain']\n"
        "from morphtrain.run import main\n"
        "main()\n"
        "assert not {'optuna', 'torch', 'mlflow'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))


@pytest.mark.slow
def test_a_sweep_of_runs_in_two_processes(command: Command, tmp_path: Path) -> None:
    sweep = ("+sweep=prunetrain", *SMALL, "processes=2", "epochs=3", "hydra.sweeper.n_trials=3", "tracking=none")
    result = command(*sweep, "hydra.sweeper.min_accuracy=null")
    assert result.returncode == 0, result.stdout + result.stderr
    assert states(trials_in(tmp_path, "prunetrain")) == {"COMPLETE": 3}
    for trial in trials_in(tmp_path, "prunetrain"):
        assert trial.user_attrs["metrics"]["processes"] == 2
        assert len(trial.intermediate_values) == 3
    assert "   3/3 trial 2:  " in result.stdout
