"""The target of a search for the least time to an accuracy: what trial 0 reaches, and the same after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import Answer
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from morphtrain.errors import UserError
from morphtrain.sweep.attributes import BASELINE_ATTR, METRICS_ATTR, NAME_ATTR, Attributes
from morphtrain.sweep.floor import parse_floor
from morphtrain.sweep.storage import open_storage
from morphtrain.sweep.study import Plan, SharedStudy
from morphtrain.sweep.target import Target
from morphtrain.sweep.trial import TrialReporter

NOP = {"_target_": "optuna.pruners.NopPruner"}


def target(objective: str = "time_to_accuracy", floor: Any = "baseline-0.1", given: float | None = None) -> Target:
    config = OmegaConf.create({"objective": [objective], "timing": {"target_accuracy": given}})
    return Target.of(config, parse_floor(floor))


def report(storage: str, number: int, *epochs: tuple[int, float, float]) -> None:
    """What a job tells of epochs: number, accuracy and seconds."""
    node = OmegaConf.create({"study_name": "s", "storage": storage, "pruner": NOP})
    reporter = TrialReporter(node, number, ["train_seconds"])
    for epoch, accuracy, seconds in epochs:
        reporter({"epoch": epoch, "val_accuracy": accuracy, "train_seconds": seconds})


def test_trial_0_sets_the_target_and_gets_its_time_to_it(tmp_path: Path) -> None:
    """Its job is killed after the third epoch, of which no checkpoint is left, and goes on."""
    storage = f"sqlite:///{tmp_path}/optuna.db"
    study = optuna.create_study(study_name="s", storage=open_storage(storage))
    study.enqueue_trial({}, user_attrs={BASELINE_ATTR: True})
    trial = study.ask()
    aim = target()
    assert aim.overrides(study.trials) == ["objective=[train_seconds]"], "it runs without a target"
    report(storage, 0, (1, 0.5, 1.0), (2, 0.85, 2.0), (3, 0.7, 3.0))
    report(storage, 0, (3, 0.8, 3.5), (4, 0.9, 4.5))
    stored = study.trials[0]
    assert [epoch["train_seconds"] for epoch in Attributes(stored).epochs] == [1.0, 2.0, 3.5, 4.5]
    assert aim.sets(stored)
    assert aim.times(stored) == {"time_to_accuracy": 2.0}, "0.8, which is never lost again"
    study.tell(trial, 2.0)
    assert aim.overrides(study.trials) == [f"timing.target_accuracy={0.9 - 0.1!r}"]
    assert aim.overrides(study.trials) == target().overrides(study.trials), "of a later command, too"
    other = study.ask()
    report(storage, other.number, (1, 0.5, 1.0))
    assert Attributes(study.trials[1]).epochs == []
    assert not aim.sets(study.trials[1])


def ended(metrics: Any, epochs: Any) -> FrozenTrial:
    attrs = {BASELINE_ATTR: True, METRICS_ATTR: metrics, "epochs": epochs}
    trial = optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs=attrs)
    trial.number = 0
    return trial


@pytest.mark.parametrize("epochs", [None, "x", [], ["x"], [{"epoch": 1}], [{"epoch": 2, "val_accuracy": 0.9}]])
def test_without_all_epochs_there_is_no_time(epochs: Any) -> None:
    assert target().times(ended({"epoch": 2.0, "val_accuracy": 0.9}, epochs)) == {}


def test_there_is_nothing_to_set_where_the_target_is_given_or_not_aimed_at() -> None:
    trials = [ended({"epoch": 1, "val_accuracy": 0.9}, [])]
    assert target("train_seconds").overrides(trials) == []
    assert target(given=0.8).overrides(trials) == []
    assert not target(given=0.8).sets(trials[0])
    assert target(floor=0.7).overrides([]) == ["timing.target_accuracy=0.7"], (
        "a number is known from the first trial on"
    )
    assert target(given=0.8).accuracy(trials, parse_floor(0.85)) == 0.85
    assert target("train_seconds").accuracy(trials, None) is None
    with pytest.raises(UserError, match=r"hydra\.sweeper\.min_accuracy: -0\.1 is what it makes, the target"):
        target(floor="baseline-1").overrides(trials)


def test_every_baseline_has_its_trial_even_after_a_kill_between_two(tmp_path: Path) -> None:
    plan = Plan("s", f"sqlite:///{tmp_path}/optuna.db", ["minimize"], {}, 5, {}, True, ["sooner", "narrower"])

    def opened() -> SharedStudy:
        return SharedStudy(plan, optuna.samplers.RandomSampler(seed=0), optuna.pruners.NopPruner())

    study = optuna.create_study(study_name="s", storage=open_storage(plan.storage))
    study.set_user_attr("facts", {"directions": ["minimize"]})
    study.enqueue_trial({}, user_attrs={BASELINE_ATTR: True})  # as a worker leaves it that is killed here
    for _ in range(2):
        assert [Attributes(trial).baseline for trial in opened().trials] == ["baseline", "sooner", "narrower"]
    study.enqueue_trial({}, user_attrs={NAME_ATTR: 3})
    assert Attributes(study.trials[3]).baseline is None, "what is no text is nobody's name"


SWEEP = ("-m", "hydra/sweeper=morphtrain", "tracking=none", "model.width=4,8")
SOONER = "+hydra.sweeper.more_baselines={sooner: {epochs: 0.5}}"
WRONG = {
    "no target": (["objective=[time_to_accuracy]"], "timing.target_accuracy=null: must be a val_accuracy"),
    "more without one": (
        ["hydra.sweeper.baseline=null", SOONER],
        "hydra.sweeper.more_baselines: needs a baseline, and hydra.sweeper.baseline=null makes none",
    ),
    "confirm without one": (
        ["hydra.sweeper.baseline=null", "hydra.sweeper.confirm.best=1"],
        "hydra.sweeper.confirm.best: needs a baseline",
    ),
    "a share": (
        ["+hydra.sweeper.more_baselines={sooner: {epochs: 0}}"],
        "hydra.sweeper.more_baselines.sooner.epochs=0.0: must be above 0",
    ),
    "a key": (
        ["+hydra.sweeper.more_baselines={sooner: {epoch: 0.5}}"],
        "hydra.sweeper.more_baselines.sooner.epoch=0.5: no such key",
    ),
    "no keys": (["+hydra.sweeper.more_baselines={sooner: 3}"], "hydra.sweeper.more_baselines.sooner=3: must be keys"),
    "a name": (
        ["+hydra.sweeper.more_baselines={baseline: {epochs: 0.5}}"],
        "hydra.sweeper.more_baselines=baseline: must be names of letters",
    ),
    "overrides": (
        ["+hydra.sweeper.more_baselines={other: {overrides: [epochs]}}"],
        "hydra.sweeper.more_baselines.other.overrides=['epochs']: must be a list of overrides",
    ),
    "seeds": (["hydra.sweeper.confirm.seeds=2"], "hydra.sweeper.confirm.seeds=2: must be 3 or more"),
    "best": (["hydra.sweeper.confirm.best=-1"], "hydra.sweeper.confirm.best=-1: must be a number of trials"),
    "what to confirm": (
        ["hydra.sweeper.confirm.best=3", "objective=[val_loss]"],
        "hydra.sweeper.confirm.best=3: compares ratios of one metric that is minimized, as a time",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_found_before_the_first_trial(case: str, answer: Answer) -> None:
    typed, said = WRONG[case]
    refused = answer(*SWEEP, *typed)
    assert refused.startswith(said), refused
    assert "\n" not in refused
