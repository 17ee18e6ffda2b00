"""The end of a search: its best trials again with fresh seeds, by one worker, however often it is killed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import optuna
import pytest
from conftest import KILLED_RUN, Kill
from fork_server import ForkServer
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from optuna.trial import TrialState

from morphtrain import interrupts
from morphtrain.errors import UserError
from morphtrain.evidence import experiment as evidence
from morphtrain.evidence.experiment import Arm
from morphtrain.evidence.winner import SAVES
from morphtrain.experiment.sweeper import ArmsSweeper
from morphtrain.schema.sweeper import MoreBaseline
from morphtrain.sweep import confirmation
from morphtrain.sweep.attributes import Attributes
from morphtrain.sweep.baseline import Baselines
from morphtrain.sweep.confirmation import Confirmation, declared, fresh_seeds
from morphtrain.sweep.search_space import SearchSpace
from morphtrain.sweep.storage import open_storage
from morphtrain.sweep.study import Plan
from morphtrain.timing.summaries import NEVER

SECONDS = {"baseline": 10.0, "sooner": 7.0, "trial_4": 4.0, "trial_7": 6.0}  # what the arms take
ARMS = {
    "baseline": Arm(("epochs=30", "prune=none"), "dense"),
    "sooner": Arm(("epochs=15", "prune=none"), "sooner"),
    "trial_4": Arm(("epochs=20", "prune=prunetrain")),
    "trial_7": Arm(("epochs=25", "prune=none")),
}


class Jobs:
    """A launcher whose jobs leave records at once.

    Args:
        before: called with the name of each run, `<seed>/<arm>`, before it leaves any; what it raises fails the run.
    """

    def __init__(self, before: Callable[[str], Any] = lambda _: None) -> None:
        self.before = before
        self.started: list[str] = []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        return [self._run(dict(override.split("=", 1) for override in job)) for job in jobs]

    def _run(self, job: Mapping[str, str]) -> JobReturn:
        name = job["hydra.sweep.subdir"]
        self.started.append(name)
        try:
            self.before(name)
        except UserError as error:
            return JobReturn(status=JobStatus.FAILED, _return_value=error)
        run = Path(job["hydra.sweep.dir"].strip("'"), name)
        run.mkdir(parents=True)
        seconds = SECONDS[run.name] * (1 + 0.01 * (int(job["seed"]) % 3))
        accuracy = 0.8 if (run.name, job["seed"]) == ("trial_7", "3") else 0.9 + 0.001 * len(run.name)
        time = NEVER * 1.1 if accuracy < 0.9 else seconds
        record = {"epoch": 1, "val_accuracy": accuracy, "test_accuracy": accuracy, "time_to_accuracy": time}
        record |= {"contended": 0.0, "params": 5.0, "calibrated_train_seconds": seconds, "changed": 0.0}
        (run / "records.jsonl").write_text(json.dumps(record) + "\n")
        (run / "run.png").touch()
        return JobReturn(status=JobStatus.COMPLETED, _return_value=1.0)


def confirmed(place: Path, worker: str = "one") -> Confirmation:
    """A confirmation of a study in `place`, as one of its workers has it."""
    experiment = declared("s", "confirm-8", ARMS, (2, 3, 4), "time_to_accuracy")
    plan = Plan("s confirm-8", f"sqlite:///{place}/optuna.db", ["minimize"], {"confirm": {"best": 2}}, 1, None)
    return Confirmation(experiment, plan, place / worker, place / worker / "confirm-8", 0.9)


def run(found: Confirmation, jobs: Jobs) -> Any:
    """The trial that it has been."""
    logging = OmegaConf.create({"version": 1, "root": None})  # leaves pytest's as it is
    runtime = SimpleNamespace(choices={"hydra/launcher": "basic"})
    config: Any = SimpleNamespace(hydra=SimpleNamespace(hydra_logging=logging, verbose=False, runtime=runtime))
    context: Any = SimpleNamespace(execution_whitelist=None)
    arms = ArmsSweeper({"attempts": 3})
    arms.place(context, config, jobs, found.directory, tracking=None)  # type: ignore[arg-type]
    return found.run(arms, heartbeat_seconds=0.5, parent=None)


def test_all_arms_of_a_seed_run_before_the_next_and_the_winner_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, found = Jobs(), confirmed(tmp_path)
    assert run(found, jobs).state == TrialState.COMPLETE
    assert [name.split("/")[0] for name in jobs.started] == ["2"] * 4 + ["3"] * 4 + ["4"] * 4
    assert all({name.split("/")[1] for name in jobs.started[i : i + 4]} == set(ARMS) for i in (0, 4, 8))
    capsys.readouterr()
    winner = found.show()
    assert (winner.verdict, winner.arm, winner.baseline) == (SAVES, "trial_4", "sooner")
    assert winner.ratio is not None and winner.ratio.mean == pytest.approx(4 / 7)
    assert winner.reached == {"baseline": 3, "sooner": 3, "trial_4": 3, "trial_7": 2}
    said = capsys.readouterr().out
    assert "the time to the target accuracy in seconds: saves 43 %: trial_4 takes 0.571429" in said
    assert "2 of 3" in said, "trial_7 has missed the target once"
    assert "test_accuracy of trial_4 less that of sooner: +0.001" in said
    assert confirmation.metrics(winner)["confirmed_ratio"] == pytest.approx(4 / 7)
    again = Jobs()
    assert run(found, again).state == TrialState.COMPLETE
    assert again.started == []


def test_what_a_killed_worker_has_left_is_taken_up(tmp_path: Path) -> None:
    """By another command in the same directory, which runs only what has not ended."""

    def stop_at_the_sixth(name: str) -> None:
        if len(jobs.started) == 6:
            raise interrupts.Interrupted(signal.SIGTERM)

    jobs, found = Jobs(stop_at_the_sixth), confirmed(tmp_path)
    with pytest.raises(interrupts.Interrupted):
        run(found, jobs)
    rest = Jobs()
    assert run(found, rest).state == TrialState.COMPLETE
    assert sorted([*jobs.started[:5], *rest.started]) == sorted(f"{seed}/{arm}" for seed in (2, 3, 4) for arm in ARMS)


def test_one_of_two_workers_runs_it_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, waits = threading.Event(), threading.Event()

    def until_the_other_waits(name: str) -> None:
        begun.set()
        assert waits.wait(30)

    def wait(seconds: float) -> None:
        waits.set()
        threading.Event().wait(0.02)

    monkeypatch.setattr(confirmation.interrupts, "wait", wait)
    first, second = Jobs(until_the_other_waits), Jobs()
    thread = threading.Thread(target=run, args=(confirmed(tmp_path, "one"), first))
    thread.start()
    assert begun.wait(30)
    other = confirmed(tmp_path, "two")
    trial = run(other, second)
    thread.join()
    assert (len(first.started), second.started) == (12, [])
    assert Attributes(trial).run_dir == str(tmp_path / "one" / "confirm-8"), "where the other can say it is"
    assert not other.directory.exists()


def test_a_run_that_fails_is_told_and_repeated_by_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(name: str) -> None:
        if name == "3/trial_4":
            raise UserError("optimizer.lr=0.4: training diverged")

    found = confirmed(tmp_path)
    with pytest.raises(UserError, match=r"1 of 12 runs failed, as seed 3 trial_4: optimizer\.lr=0\.4: training div"):
        run(found, Jobs(diverge))
    assert "the target was reached by trial_4 with 2 of 3 seeds and sooner with 3 of 3" in capsys.readouterr().out
    jobs = Jobs()
    assert run(found, jobs).state == TrialState.COMPLETE
    assert jobs.started == ["3/trial_4"]
    jobs = Jobs()
    run(found, jobs)
    assert jobs.started == []


def test_a_confirmation_of_other_seeds_is_another(tmp_path: Path) -> None:
    found = confirmed(tmp_path)
    run(found, Jobs())
    plan = Plan(found.plan.name, found.plan.storage, ["minimize"], {"confirm": {"best": 3}}, 1, None)
    other = Confirmation(found.experiment, plan, found.sweep_dir, found.directory, 0.9)
    with pytest.raises(UserError, match=r"its trials have confirm=.*best.*2.*, which cannot be compared with .*3"):
        run(other, Jobs())


def test_seeds_are_fresh() -> None:
    study = optuna.create_study()
    assert fresh_seeds(study.trials, 1, 3) == [2, 3, 4]
    assert fresh_seeds(study.trials, 7, 3) == [1, 2, 3]
    for seed in (1, 3):
        study.enqueue_trial({"seed": seed})
        trial = study.ask()
        trial.suggest_categorical("seed", [1, 2, 3])
        study.tell(trial, 1.0)
    assert fresh_seeds(study.trials, 5, 3) == [2, 4, 6]


def composed(overrides: Sequence[str]) -> Any:
    """A config of nothing but overrides, over a network of width 16 for 30 epochs."""
    return OmegaConf.from_dotlist(["epochs=30", "model.width=16", "prune=none", *overrides])


def arms(best: Mapping[str, Sequence[str]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Arm]:
    monkeypatch.setattr(confirmation.schema, "parse", lambda config: config)
    space = SearchSpace(["epochs=30", "optimizer.lr=0.1,0.2"], None, composed([]))
    more = {"sooner": MoreBaseline(epochs=0.5), "narrower": MoreBaseline(width=0.75)}
    baselines = Baselines(["prune=none"], more, space, composed)
    return confirmation.arms(baselines.first(), baselines, best, composed)


def test_the_winner_is_compared_with_itself_without_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = ["epochs=20", "precision=bf16", "prune=prunetrain", "prune.interval=2"]
    dense = ["epochs=12", "precision=bf16", "prune=none"]
    found = arms({"trial_4": pruned, "trial_9": dense}, monkeypatch)
    assert list(found) == ["baseline", "sooner", "narrower", "trial_4_plain", "trial_4", "trial_9"]
    assert found["sooner"].overrides == ("epochs=15", "prune=none")
    assert found["narrower"].overrides == ("epochs=30", "prune=none", "model.width=12")
    assert found["trial_4_plain"].overrides == ("epochs=20", "precision=bf16", "prune=none")
    assert [arm.role for arm in found.values()] == ["dense", "sooner", "narrower", "sooner", "method", "method"]


def test_arms_that_are_the_same_run_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = arms({"trial_4": ["epochs=12", "prune=none"], "trial_5": ["prune=none", "epochs=15"]}, monkeypatch)
    assert list(found) == ["baseline", "sooner", "narrower", "trial_4"], "trial_5 is sooner, trial_4 has no method"
    assert arms({"trial_5": ["prune=none", "epochs=15"]}, monkeypatch) == {}, "there is nothing to confirm"


FASTEST = (
    *("+sweep=fastest", "objective=[time_to_accuracy]", "timing.reference=0", "precision=o0"),
    *("data=synthetic", "data.train_samples=64", "data.val_samples=64", "data.image_size=8", "data.noise=0.2"),
    *("model.width=4", "model.stages=1", "batch_policy.batch_size=16", "epochs=2", "optimizer.lr=0.05"),
    *("prune=none,prunetrain", "data.progressive=1", "data.infobatch=0"),  # two epochs are too few for the others
    *("hydra/sweeper/pruner=none", "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=1"),
    *("hydra.sweeper.n_trials=5", "hydra.sweeper.confirm.seeds=3", "hydra.sweeper.min_accuracy=baseline-0.05"),
    *(
        "hydra.sweeper.shares={epochs: null, model.width: null}",
        "hydra.sweeper.baseline=['prune=none','optimizer.lr=1e-9']",
    ),
)
STEPS = 4  # of an epoch
QUICKLY = {"UNDISTURBED": "1"}  # or runs without calibrated times are repeated on a busy machine, and fail


def test_the_whole_search_goes_on_after_a_kill_in_any_phase(
    fork_server: ForkServer, kill: Kill, tmp_path: Path
) -> None:
    """Killed in its third trial, then in its confirmation, then typed twice more. The baselines learn nothing."""

    def search() -> subprocess.CompletedProcess[str]:
        return fork_server.run([KILLED_RUN, "never:0", *FASTEST], tmp_path, QUICKLY)

    kill(f"step:{STEPS * (2 + 1 + 1) + 1}", *FASTEST, env=QUICKLY)
    before = studied(tmp_path)
    assert [trial.state.name for trial in before.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    kill(f"step:{STEPS * (1 + 2 + 2 + 9) + 1}", *FASTEST, env=QUICKLY)
    directory = tmp_path / "multirun/fastest/confirm-5"
    stamps = {path: path.stat().st_mtime_ns for path in directory.glob("*/*/run.png")}
    assert stamps, sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("multirun/**/records.jsonl"))

    result = search()
    assert result.returncode == 0, result.stdout + result.stderr
    study = studied(tmp_path)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5
    assert [Attributes(trial).baseline for trial in study.trials[:4]] == ["baseline", "sooner", "narrower", None]
    reached = study.trials[0].user_attrs["metrics"]["val_accuracy"]
    for trial in study.trials[1:]:
        assert trial.user_attrs["overrides"][-1] == f"timing.target_accuracy={reached - 0.05!r}", "after kills as well"
    records = [json.loads(line) for line in (tmp_path / "multirun/fastest/0/records.jsonl").read_text().splitlines()]
    late = [i for i, record in enumerate(records) if record["val_accuracy"] < reached - 0.05]
    first = records[late[-1] + 1 if late else 0]
    assert study.trials[0].values == [first["train_seconds"]]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "what has ended is not run again"
    declared = evidence.load(directory)
    assert declared.seeds == (2, 3, 4)
    assert {"baseline", "sooner", "narrower"} < declared.arms.keys()
    assert len(list(directory.glob("*/*/run.png"))) == 3 * len(declared.arms)
    assert "with 3 seeds that the search never saw" in result.stdout
    assert "the time to the target accuracy in seconds: " in result.stdout
    told = re.search(r"to run trial_\d again:  python -m morphtrain.run ", result.stdout)
    assert told or "reached the target again" in result.stdout
    check_tracking(tmp_path, trials=5, runs=3 * len(declared.arms))

    again = search()
    assert again.returncode == 0, again.stderr
    assert answer(again) == answer(result)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    shutil.rmtree(directory)
    elsewhere = search()
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert f"another worker has run the best trials with fresh seeds, in {directory}" in elsewhere.stdout


def studied(directory: Path) -> optuna.Study:
    return optuna.load_study(study_name="fastest", storage=open_storage(f"sqlite:///{directory}/optuna.db"))


def answer(result: subprocess.CompletedProcess[str]) -> str:
    return next(line for line in result.stdout.splitlines() if line.startswith("the time to the target accuracy"))


def check_tracking(directory: Path, trials: int, runs: int) -> None:
    """All runs hang below the sweep's own, each once."""
    client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = [run for run in found if "sweep_dir" in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1 == trials + runs
    assert sum("trial" in run.data.tags for run in children) == trials
    assert {run.info.status for run in found} == {"FINISHED"}
    assert parent.data.metrics["trials_complete"] == trials
