"""A sweep's report under contention, and when nothing that was tried changed a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from morphtrain.grow.when import When
from morphtrain.sweep import report
from morphtrain.sweep.attributes import (
    BASELINE_ATTR,
    CHANGED_ATTR,
    CONTENDED_ATTR,
    METRICS_ATTR,
    NAME_ATTR,
    OVERRIDES_ATTR,
    REFERENCES_ATTR,
    Attributes,
)
from morphtrain.sweep.comparison import compared, completed
from morphtrain.sweep.floor import parse_floor
from morphtrain.sweep.storage import open_storage
from morphtrain.sweep.trial import TrialReporter


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def study(*trials: dict[str, Any], objective: tuple[str, ...] = ("train_seconds",)) -> optuna.Study:
    """Trials given by `raw` seconds, perhaps `calibrated` ones, and the number of `contended` and `changed` epochs.

    A `name` makes one a further baseline; `excess`: by how much it is not accurate enough.
    """
    made = optuna.create_study(study_name="s", directions=["minimize"] * len(objective))
    for number, given in enumerate(trials):
        metrics = {"train_seconds": given["raw"], "val_accuracy": 0.9, "params": 10.0, "epoch": 5.0}
        attrs: dict[str, Any] = {METRICS_ATTR: metrics, OVERRIDES_ATTR: [f"lr={number}"]}
        if "calibrated" in given:
            metrics["calibrated_train_seconds"] = given["calibrated"]
            attrs[REFERENCES_ATTR] = given.get("references", [0.01, 0.02])
        if "contended" in given:
            attrs[CONTENDED_ATTR] = list(range(given["contended"]))
        if "changed" in given:
            attrs[CHANGED_ATTR] = list(range(given["changed"]))
        attrs |= {NAME_ATTR: given["name"]} if "name" in given else {}
        params = {} if number == 0 or "name" in given else {"lr": float(number)}
        attrs |= {BASELINE_ATTR: True} if number == 0 else {}
        space = {key: FloatDistribution(0, 100) for key in params}
        values = [metrics[name] for name in objective]
        excess = {"constraints:val_accuracy": given.get("excess", 0.0)}
        made.add_trial(
            optuna.trial.create_trial(
                values=values, params=params, distributions=space, user_attrs=attrs, system_attrs=excess
            )
        )
    return made


def closing(made: optuna.Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(report.charts, "draw", lambda *_: [])
    monkeypatch.setattr(report, "_results", lambda *_: Path("results"))
    report.close(made, ["train_seconds"], Path(), lambda trial: [f"optimizer.lr={trial.params}"])
    return capsys.readouterr().out


def test_calibrated_times_decide_where_a_trial_was_disturbed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The issue's case: beside others the baseline takes six times as long, so that trial 1 seems to win."""
    made = study({"raw": 60.0, "calibrated": 10.0, "contended": 5}, {"raw": 9.8, "calibrated": 10.4})
    text = closing(made, capsys, monkeypatch)
    assert "the baseline is the best of 2 trials, from one run each" in text
    assert "1 of 2 trials had contended epochs: trials are compared by calibrated times" in text
    assert "0.163" not in text
    assert "5 of 5" in text, "the row says which"
    metrics = report.summary(made, ["train_seconds"])
    assert metrics["best_calibrated_train_seconds"] == 10.0
    assert (metrics["best_trial"], metrics["trials_contended"]) == (0, 1)


def test_undisturbed_trials_are_compared_by_what_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study({"raw": 10.0, "calibrated": 10.0}, {"raw": 9.0, "calibrated": 11.0})
    text = closing(made, capsys, monkeypatch)
    assert "train_seconds: best / baseline 0.900" in text
    assert "contended" not in text


def test_times_that_nothing_calibrates_are_not_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study({"raw": 60.0, "contended": 5}, {"raw": 9.8}, {"raw": 9.9})
    text = closing(made, capsys, monkeypatch)
    assert "1 of 3 trials had contended epochs: their times do not compare" in text
    assert "best / baseline" not in text
    assert "the baseline is the best" not in closing(
        study({"raw": 9.0}, {"raw": 9.8, "contended": 1}), capsys, monkeypatch
    )


def test_one_measurement_of_the_machine_in_a_disturbed_trial_calibrates_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed = {"raw": 60.0, "calibrated": 10.0, "contended": 5, "references": [0.01]}
    text = closing(study(disturbed, {"raw": 9.8, "calibrated": 10.4}), capsys, monkeypatch)
    assert "their times do not compare, for calibrated_train_seconds does not allow for it" in text
    assert "baseline is the best" not in text
    once = {"raw": 9.8, "calibrated": 10.4, "references": [0.01]}
    text = closing(study({**disturbed, "references": [0.01, 0.02]}, once), capsys, monkeypatch)
    assert "trials are compared by calibrated times" in text, "nothing disturbed the second"


def test_a_baseline_alone_is_compared_with_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = closing(study({"raw": 9.0}), capsys, monkeypatch)
    assert "only the baseline has a result" in said
    assert "the baseline is the best" not in said
    assert "the baseline is the best of 2 trials, from one run each" in closing(
        study({"raw": 9.0}, {"raw": 9.5}), capsys, monkeypatch
    )


def test_a_search_that_changed_no_network_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = closing(study({"raw": 10.0}, {"raw": 9.0, "changed": 0}, {"raw": 9.5, "changed": 0}), capsys, monkeypatch)
    assert "no trial changed its network" in text
    assert "prune.start_epoch" in text
    assert "best / baseline" not in text, "it is the same network twice"
    text = closing(study({"raw": 10.0}, {"raw": 9.0, "changed": 2}, {"raw": 9.5, "changed": 0}), capsys, monkeypatch)
    assert "1 of 2 trials never changed its network" in text
    assert "best / baseline 0.900" in text
    assert "changed" not in closing(study({"raw": 10.0}, {"raw": 9.0}), capsys, monkeypatch), "none was meant to"


def test_the_best_trial_is_compared_with_the_best_baseline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster of two that are accurate enough; a third is faster still and is not."""
    sooner, narrower = {"raw": 6.0, "name": "sooner"}, {"raw": 4.0, "name": "narrower", "excess": 0.1}
    named = study({"raw": 10.0}, sooner, narrower, {"raw": 3.0})
    text = closing(named, capsys, monkeypatch)
    assert "best / baseline sooner 0.500" in text
    assert "1 (sooner)" in text and "2 (narrower)" in text and "0 (baseline)" in text
    assert [trial.number for trial in report.best_searched(compared(named, ["train_seconds"]), 3)] == [3]
    assert len(compared(named, ["train_seconds"]).searched.get_trials(states=(TrialState.COMPLETE,))) == 1


def test_a_trial_that_missed_its_target_hides_no_difference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a value of 1e9 and more, beside which all times are alike."""
    made = optuna.create_study(study_name="s")
    for value in (10.0, 1.02e9, 8.0):
        made.add_trial(optuna.trial.create_trial(value=value, user_attrs={METRICS_ATTR: {"val_accuracy": 0.9}}))
    comparison = compared(made, ["time_to_accuracy"])
    assert [trial.values for trial in completed(comparison.reached(made))] == [[10.0], [8.0]]
    assert comparison.reached(made).get_trials()[1].state == TrialState.FAIL
    assert compared(made, ["macs"]).reached(made) is made, "a number of MACs may be as large"
    monkeypatch.setattr(report, "importances", lambda *_: [])
    monkeypatch.setattr(report.charts, "draw", lambda *_: [])
    monkeypatch.setattr(report, "_results", lambda *_: Path("results"))
    report.close(made, ["time_to_accuracy"], Path(), lambda trial: [])
    assert "missed by 0.0200" in capsys.readouterr().out


def test_the_front_of_two_objectives_is_that_of_calibrated_times() -> None:
    two = ("train_seconds", "params")
    made = study({"raw": 60.0, "calibrated": 10.0, "contended": 5}, {"raw": 9.8, "calibrated": 10.4}, objective=two)
    comparison = compared(made, two)
    assert comparison.objective == ["calibrated_train_seconds", "params"]
    assert [trial.number for trial in comparison.study.best_trials] == [0]
    assert [trial.number for trial in made.best_trials] == [1], "the study itself is left as it was"


def test_a_job_reports_its_contended_and_changing_epochs_across_a_resumption(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db"
    made = optuna.create_study(study_name="s", storage=open_storage(storage))
    number = made.ask().number
    pruner = {"_target_": "optuna.pruners.NopPruner"}
    sweeper = OmegaConf.create({"study_name": "s", "storage": storage, "pruner": pruner})

    def report_epochs(*epochs: int) -> None:
        reporter = TrialReporter(sweeper, number, ["train_seconds"], reshapes=True)
        assert reporter.trial_id is not None
        for epoch in epochs:
            flags = {"contended": float(epoch in (2, 4)), "changed": float(epoch == 3)}
            reporter({"epoch": float(epoch), "train_seconds": 1.0, "reference_seconds": float(epoch // 3), **flags})

    report_epochs()
    assert made.trials[number].user_attrs[CHANGED_ATTR] == []
    report_epochs(1, 2, 3)
    report_epochs(3, 4, 5)  # its third epoch had not reached a checkpoint
    attrs = made.trials[number].user_attrs
    assert (attrs[CONTENDED_ATTR], attrs[CHANGED_ATTR]) == ([2, 4], [3])
    assert attrs[REFERENCES_ATTR] == [0, 1]


NAMES = (BASELINE_ATTR, CHANGED_ATTR, CONTENDED_ATTR, METRICS_ATTR, REFERENCES_ATTR)
NAMES += ("overrides", "run_dir", "error", "stopped_at", "baseline_name", "epochs", "signature", "same_run_as")


@pytest.mark.parametrize("foreign", ["x", 3.5, None, {"train_seconds": "x"}, ["x", 2], True])
def test_attributes_that_are_not_ours_disturb_neither_a_job_nor_the_report(
    foreign: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to the study can store anything."""
    storage = f"sqlite:///{tmp_path}/optuna.db"
    made = optuna.create_study(study_name="s", storage=open_storage(storage))
    trial = made.ask()
    for name in NAMES:
        trial.set_user_attr(name, foreign)
    pruner = {"_target_": "optuna.pruners.MedianPruner"}
    sweeper = OmegaConf.create({"study_name": "s", "storage": storage, "pruner": pruner})
    report_epoch = TrialReporter(sweeper, trial.number, ["train_seconds"], reshapes=True)
    report_epoch({"epoch": 1.0, "train_seconds": 2.0, "val_accuracy": 0.5, "contended": 1.0})
    assert Attributes(made.trials[0]).metrics["train_seconds"] == 2
    assert 1 in Attributes(made.trials[0]).contended
    made.tell(trial, 2.0)
    made.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=dict.fromkeys(NAMES, foreign)))
    assert "1 of 2 trials had contended epochs" in closing(made, capsys, monkeypatch) or foreign == ["x", 2]
    assert parse_floor(0.5).excess(0.4, made.trials) == pytest.approx(0.1)


def test_only_the_first_trial_is_a_baseline() -> None:
    made = study({"raw": 9.0}, {"raw": 8.0})
    made.enqueue_trial({}, user_attrs={BASELINE_ATTR: True})
    made.tell(made.ask(), 7.0)
    assert [Attributes(trial).is_baseline for trial in made.trials] == [True, False, False]
    assert len(compared(made, ["train_seconds"]).searched.get_trials(states=(TrialState.COMPLETE,))) == 2


@pytest.mark.parametrize("patience", [1, 2, 4])
@pytest.mark.parametrize("epochs", range(2, 9))
def test_a_run_too_short_to_grow_says_so(patience: int, epochs: int, caplog: pytest.LogCaptureFixture) -> None:
    """The warning against the rule itself, in a run whose accuracy never rises."""
    when = When(SimpleNamespace(at_epochs=[], patience=patience, smoothing=0.0, max_times=1))  # type: ignore[arg-type]
    run: Any = SimpleNamespace(config=SimpleNamespace(epochs=epochs), epoch=0, history=[])
    when.check_reach(run)
    grows = False
    for run.epoch in range(1, epochs + 1):
        grows |= bool(when.due(run))
        run.history.append({"val_accuracy": 0.1})
    assert ("cannot grow" in caplog.text) == (not grows)
