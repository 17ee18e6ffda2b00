"""Metrics of a whole run, made to be objectives, and the images that no decision sees."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from conftest import SMALL, Command
from test_settling import TINY, epoch, run_of

import morphtrain
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.method import Method
from morphtrain.state import Run
from morphtrain.sweep.attributes import BASELINE_ATTR, ERROR_ATTR, METRICS_ATTR
from morphtrain.sweep.floor import Floor, parse_floor
from morphtrain.sweep.study import Plan, SharedStudy
from morphtrain.sweep.sweeper import StudySweeper
from morphtrain.sweep.workers import Worker
from morphtrain.timing.summaries import NEVER, median_epoch_seconds, time_to_accuracy
from morphtrain.trainer import checkpoint_file, train

QUICK = (*TINY, "model.width=4", "batch_policy.batch_size=50")


def timed(seconds: Sequence[float], warmup: int = 1, **more: Sequence[float]) -> list[dict[str, float]]:
    return [
        {"epoch_seconds": s, "warmup": float(i < warmup), **{key: values[i] for key, values in more.items()}}
        for i, s in enumerate(seconds)
    ]


def test_the_median_is_of_the_last_half_after_warm_up() -> None:
    assert median_epoch_seconds(timed([90, 8, 8, 8, 2, 1, 3])) == 2  # of 2, 1, 3
    assert median_epoch_seconds(timed([90])) == 90
    assert median_epoch_seconds(timed([90, 8])) == 8
    assert median_epoch_seconds(timed([90, 7, 5, 4], calibrated_seconds=[9.0, 0.7, 0.5, 0.4])) == 0.45
    assert median_epoch_seconds([*timed([90, 7, 5]), *timed([4], 0, calibrated_seconds=[1.0])]) == 4.5
    assert median_epoch_seconds([*timed([90, 7]), *timed([4, 5], 0, calibrated_seconds=[1.0, 1.0])]) == 1


def reached(accuracies: Sequence[float]) -> list[dict[str, float]]:
    return [{"val_accuracy": a, "train_seconds": 10.0 * i} for i, a in enumerate(accuracies, 1)]


def test_the_time_to_an_accuracy_is_when_it_is_kept_from() -> None:
    assert time_to_accuracy(reached([0.5, 0.9, 0.8, 0.9, 0.95]), 0.9) == 40
    assert time_to_accuracy(reached([0.9]), 0.9) == 10
    never, closer = (time_to_accuracy(reached([0.95, last]), 0.9) for last in (0.2, 0.89))
    assert never > closer >= NEVER > 1e8, "not even years of training are worse than never"


def test_the_time_to_an_accuracy_can_be_calibrated() -> None:
    slowed = [{**record, "calibrated": record["train_seconds"] / 4} for record in reached([0.5, 0.9, 0.95])]
    assert time_to_accuracy(slowed, 0.9) == 20
    assert time_to_accuracy(slowed, 0.9, "calibrated") == 5
    calibrated = "objective=[calibrated_time_to_accuracy]"
    with pytest.raises(UserError, match=r"timing\.reference=0\.0: must be above 0 for objective=calibrated_time_to"):
        morphtrain.compose("timing.reference=0", "timing.target_accuracy=0.5", calibrated)
    with pytest.raises(UserError, match=r"timing\.target_accuracy=null: .* for objective=calibrated_time_to_accuracy"):
        morphtrain.compose(calibrated)


def test_both_are_objectives_and_in_every_record(tmp_path: Path) -> None:
    overrides = (*QUICK, "epochs=4", "timing.target_accuracy=0.01", "objective=[time_to_accuracy,median_epoch_seconds]")
    values = train(morphtrain.compose(*overrides), tmp_path, {})
    records = read_records(tmp_path)
    assert values == [records[0]["train_seconds"], median_epoch_seconds(records)]
    assert all({"time_to_accuracy", "median_epoch_seconds"} <= record.keys() for record in records)
    assert records[-1]["calibrated_time_to_accuracy"] == records[0]["calibrated_train_seconds"] != values[0]
    with pytest.raises(UserError, match=r"timing\.target_accuracy=null: .* for objective=time_to_accuracy"):
        morphtrain.compose("objective=[time_to_accuracy]")
    with pytest.raises(UserError, match=r"timing\.target_accuracy=90\.0: must be"):
        morphtrain.compose("timing.target_accuracy=90")


@pytest.mark.parametrize("own", [(), ("methods=[{_target_: test_summaries.Stopping}]",)], ids=["ours", "own"])
def test_no_objective_sees_the_test_images(own: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="objective=test_accuracy: must be another metric"):
        morphtrain.compose("objective=[test_accuracy]", *own)


class Slow(Method):
    """Takes its time before the first epoch."""

    def before_training(self, run: Run) -> None:
        time.sleep(0.2)


def test_the_start_of_a_method_is_on_the_clock() -> None:
    run = run_of(*QUICK, "epochs=2", "methods=[{_target_: test_summaries.Slow}]")
    first, second = epoch(run), epoch(run)
    assert 0.2 <= first["setup_seconds"] < 2
    assert second["setup_seconds"] == 0
    parts = ("setup_seconds", "epoch_seconds", "morph_seconds")
    spent = sum(record[part] for record in (first, second) for part in parts)
    assert second["train_seconds"] == pytest.approx(spent)


PEAKS = """
import sys, morphtrain
from morphtrain.trainer import begin_epoch, build_run, finish_epoch, start, train_epoch
from morphtrain.trainer.process import prepare_process

for width in sys.argv[1:]:
    prepare_process()
    run = build_run(morphtrain.compose("data=synthetic", "data.train_samples=256", "batch_policy.batch_size=128",
                                       f"model.width={width}"))
    start(run)
    begin_epoch(run)
    train_epoch(run)
    print(finish_epoch(run).get("peak_memory_bytes"))
"""


def test_a_runs_peak_memory_is_its_own() -> None:
    result = subprocess.run([sys.executable, "-c", PEAKS, "4", "64", "4"], capture_output=True, text=True, check=True)
    if "None" in result.stdout:
        pytest.skip("this system does not let a process reset its peak, so there is no such metric")
    first, wide, again = map(int, result.stdout.split())
    assert wide > 1.5 * first
    assert again < 1.1 * first


class Stopping(Method):
    """Ends the run in its second epoch, after it was evaluated."""

    def measure(self, run: Run) -> None:
        assert not any("test_accuracy" in record for record in run.history)
        run.stopped = run.epoch == 2


@pytest.mark.parametrize("options", [("epochs=2",), ("epochs=9", "methods=[{_target_: test_summaries.Stopping}]")])
def test_the_test_images_are_seen_once_at_the_end(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(morphtrain.compose(*QUICK, *options), tmp_path, {})
    first, last = read_records(tmp_path)
    assert "test_accuracy" not in first and "test_loss" not in first
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "test accuracy" in line)
    assert f"{last['test_accuracy']:.4f}" in row
    network = morphtrain.load(tmp_path / "last.pt")
    data = run_of(*QUICK).data
    right = (network(data.test.pixels).argmax(1) == data.test.labels).float().mean().item()
    assert last["test_accuracy"] == pytest.approx(right, abs=1e-6)
    assert not torch.equal(data.test.pixels, data.val.pixels)


def test_an_older_checkpoint_goes_on_without_a_test(tmp_path: Path) -> None:
    def go(*overrides: str) -> None:
        given = ("tracking=none", "model.width=4", "batch_policy.batch_size=256", "timing.reference=0", *overrides)
        train(morphtrain.compose(*given), tmp_path, {})

    go("epochs=1", "data.test_share=0")
    path = tmp_path / "last.pt"
    stored = torch.load(path, weights_only=True)
    stored["facts"] = stored["facts"].replace(', "test_share": 0.0', "").replace('"epochs": 1', '"epochs": 2')
    checkpoint_file.write(path, stored)
    assert "test_share" not in stored["facts"]
    with pytest.raises(UserError, match=r"data\.test_share=0\.5: .* was written with data\.test_share=0; resume"):
        go("epochs=2", "resume=auto")
    go("epochs=2", "resume=auto", "data.test_share=0")
    assert "test_accuracy" not in read_records(tmp_path)[1]


def ended(accuracy: float | None, number: int = 0, **attrs: object) -> optuna.trial.FrozenTrial:
    state = optuna.trial.TrialState.FAIL if accuracy is None else optuna.trial.TrialState.COMPLETE
    found = {} if accuracy is None else {METRICS_ATTR: {"val_accuracy": accuracy}}
    value = None if accuracy is None else 1.0
    trial = optuna.trial.create_trial(state=state, value=value, user_attrs={**found, **attrs})
    trial.number = number
    return trial


def test_the_least_accuracy_may_be_relative_to_the_baseline() -> None:
    trials = [ended(0.8, **{BASELINE_ATTR: True}), ended(0.9, 1)]
    floor = parse_floor("baseline-0.05")
    assert floor == Floor(0.05, relative=True)
    assert floor.excess(0.74, trials) == pytest.approx(0.01)
    assert floor.excess(0.76, trials) == pytest.approx(-0.01)
    assert parse_floor("baseline").excess(0.8, trials) == 0
    assert parse_floor(0.95).excess(0.9, []) == pytest.approx(0.05)
    assert parse_floor(None) is None
    for wrong in ("baseline-2", "baseline+0.1", "-0.01", "dense", True, 1.5, ""):
        with pytest.raises(UserError, match=r"hydra\.sweeper\.min_accuracy=.*baseline-0\.01"):
            parse_floor(wrong)
    failed = [ended(None, **{BASELINE_ATTR: True, ERROR_ATTR: "it diverged"})]
    with pytest.raises(UserError, match=r"which has failed \(it diverged\)"):
        floor.check_baseline(failed)
    with pytest.raises(UserError, match="trial 0 is none here"):
        floor.check_baseline([ended(0.9), ended(0.8, 1, **{BASELINE_ATTR: True})])
    with pytest.raises(UserError, match=r"which has failed \(no val_accuracy is stored\)"):
        floor.check_baseline([ended(0.9, **{BASELINE_ATTR: True, METRICS_ATTR: "x"})])


def test_a_sweep_is_constrained_by_what_its_baseline_reached(command: Command, tmp_path: Path) -> None:
    dense = [o for o in SMALL if not o.startswith(("prune", "epochs"))]
    sweep = ("-m", "hydra/sweeper=morphtrain", *dense, "epochs=2", "hydra.sweeper.n_trials=3", "tracking=none")
    search = ("hydra.sweeper.baseline=['optimizer.lr=0.02']", "optimizer.lr=0.02,1e-7", "hydra/sweeper/sampler=grid")
    result = command(*sweep, *search, "hydra.sweeper.min_accuracy=baseline-0.03", "hydra.sweeper.n_jobs=3")
    assert result.returncode == 0, result.stderr
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/optuna.db")
    excess = {t.user_attrs["overrides"][-1]: t.constraints["val_accuracy"] for t in study.trials[1:]}
    assert study.trials[0].constraints["val_accuracy"] == pytest.approx(-0.03)
    assert excess["optimizer.lr=0.02"] == pytest.approx(-0.03)
    assert excess["optimizer.lr=1e-07"] > 0
    others = study.trials[1:]
    assert all(trial.datetime_start >= study.trials[0].datetime_complete for trial in others)
    assert "on images that no decision has seen" in result.stdout


def test_no_worker_starts_a_trial_before_the_baseline_has_ended(tmp_path: Path) -> None:
    plan = Plan("study", f"sqlite:///{tmp_path}/optuna.db", ["minimize"], {}, 5, {}, baseline_first=True)
    study = SharedStudy(plan, optuna.samplers.RandomSampler(seed=0), optuna.pruners.NopPruner())
    with Worker(study.storage, tmp_path / "one", 30) as one, Worker(study.storage, tmp_path / "other", 30) as other:
        (baseline,) = study.take(one, 3, str)
        assert study.take(other, 3, str) == []
        assert study.others_running() == 1, "so the other waits"
        study.complete(one, baseline, [1.0])
        assert [trial.number for trial in study.take(other, 3, str)] == [1, 2, 3]


def test_without_a_baseline_nothing_is_relative_to_it() -> None:
    keys = dict(extend=None, pruner=None, min_accuracy="baseline", heartbeat_seconds=1)
    plain = SimpleNamespace(n_trials=1, n_jobs=1)
    StudySweeper(plain, baseline=[], **keys)
    with pytest.raises(UserError, match=r"min_accuracy=baseline: hydra\.sweeper\.baseline=null makes"):
        StudySweeper(plain, baseline=None, **keys)
