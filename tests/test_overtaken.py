"""Early stopping of searches for time: what it stops could not have won, and how many winners others lose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import Answer
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from morphtrain.schema.config import TO_ACCURACY
from morphtrain.sweep import trial as trial_module
from morphtrain.sweep.overtaken import CLOCKS, Overtaken, least
from morphtrain.sweep.trial import TrialReporter
from morphtrain.timing.summaries import time_to_accuracy

TARGET = 0.9
EPOCHS = 20
History = list[dict[str, float]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def history(seconds: Sequence[float], accuracies: Sequence[float]) -> History:
    """The records of a run whose epochs take these seconds, with the times to the target that it records."""
    records: History = []
    for epoch, (clock, accuracy) in enumerate(zip(np.cumsum(seconds), accuracies, strict=True), 1):
        clocks = {name: float(clock) for name in TO_ACCURACY.values()}
        records.append({"epoch": epoch, "val_accuracy": accuracy, **clocks})
        times = {name: time_to_accuracy(records, TARGET, clock) for name, clock in TO_ACCURACY.items()}
        records[-1] |= times
    return records


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.sampled_from([0.5, 0.89, 0.9, 0.95])), min_size=1, max_size=12),
    st.sampled_from(CLOCKS),
)
def test_no_run_ends_below_the_least_that_is_said_of_it(epochs: list[tuple[float, float]], metric: str) -> None:
    records = history(*zip(*epochs, strict=True))
    bounds = [least(metric, record) for record in records]
    assert all(bound <= records[-1][metric] for bound in bounds)
    assert bounds == sorted(bounds), "it only rises"


def runs(rng: np.random.Generator, count: int = 16) -> list[History]:
    """Runs of a search. Some prune: slower than the others at first, much faster in the end; some never get there."""
    found = []
    for _ in range(count):
        late = rng.random() < 0.4
        first, last, at = (rng.uniform(1.1, 1.4), rng.uniform(0.2, 0.4), int(rng.integers(4, 9))) if late else (1, 1, 0)
        pace = rng.uniform(0.8, 1.2)
        seconds = [pace * (first if epoch < at else last) * rng.uniform(0.98, 1.02) for epoch in range(EPOCHS)]
        slowness, top = rng.uniform(3, 8), rng.uniform(0.88, 0.97)
        accuracies = [top * (1 - math.exp(-(epoch + 1) / slowness)) + rng.normal(0, 0.003) for epoch in range(EPOCHS)]
        found.append(history(seconds, accuracies))
    return found


def searched(
    pruner: Mapping[str, Any], found: Sequence[History], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], float]:
    """The best three of a study of these runs as jobs report them, and how many seconds it has taken."""
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(trial_module, "open_storage", lambda _: storage)
    study = optuna.create_study(study_name="s", storage=storage)
    node = OmegaConf.create({"study_name": "s", "storage": "", "pruner": dict(pruner)})
    seconds = 0.0
    for run in found:
        trial = study.ask()
        reporter = TrialReporter(node, trial.number, ["time_to_accuracy"], EPOCHS)
        record = next((record for record in run if reporter(record)), run[-1])
        seconds += record["train_seconds"]
        trial.set_constraint("val_accuracy", TARGET - record["val_accuracy"])
        stopped = record is not run[-1]
        state = optuna.trial.TrialState.PRUNED if stopped else optuna.trial.TrialState.COMPLETE
        study.tell(trial, None if stopped else record["time_to_accuracy"], state)
    ended = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    reached = [trial for trial in ended if trial.constraints["val_accuracy"] <= 0]
    return [trial.number for trial in sorted(reached, key=lambda trial: trial.values[0])[:3]], seconds


def test_it_loses_no_winner_where_the_median_loses_late_ones(
    monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    median = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 5, "n_warmup_steps": 5}
    ours = {"_target_": "morphtrain.sweep.overtaken.Overtaken", "best": 3}
    lost, spent = dict.fromkeys(("median", "ours"), 0), dict.fromkeys(("none", "median", "ours"), 0.0)
    studies = 12
    for seed in range(studies):
        found = runs(np.random.default_rng(seed))
        best, seconds = searched({"_target_": "optuna.pruners.NopPruner"}, found, monkeypatch)
        spent["none"] += seconds
        for name, pruner in (("median", median), ("ours", ours)):
            left, seconds = searched(pruner, found, monkeypatch)
            spent[name] += seconds
            lost[name] += left[:1] != best[:1]
            if name == "ours":
                assert left == best, "nor one of the best three"
    shares = {name: seconds / spent["none"] for name, seconds in spent.items()}
    print(f"winners lost in {studies} studies: {lost}; seconds: {shares}")
    assert lost["ours"] == 0
    assert lost["median"] >= 3
    assert shares["ours"] < 0.9


def test_what_could_still_win_is_not_stopped() -> None:
    study = optuna.create_study()
    for value, excess in ((5.0, 0.0), (1.0, 0.1), (7.0, -0.1), (1.2e9, 0.0)):
        trial = study.ask()
        trial.set_constraint("val_accuracy", excess)
        study.tell(trial, value)

    def verdict(best: int, value: float) -> bool:
        trial: Any = SimpleNamespace(last_step=3, intermediate_values={3: value})
        return Overtaken(best).prune(study, trial)

    assert verdict(1, 5.1) and not verdict(1, 5.0), "the one of 1.0 is infeasible"
    assert verdict(2, 7.1) and not verdict(2, 6.9)
    assert not verdict(3, 1e8), "there are no three to be overtaken by"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["objective=[val_loss]"], "hydra/sweeper/pruner=overtaken: objective=val_loss is no time to be minimized"),
        (["objective=[median_epoch_seconds]"], "hydra/sweeper/pruner=overtaken: objective=median_epoch_seconds"),
        (["hydra.sweeper.direction=maximize"], "hydra/sweeper/pruner=overtaken: objective=train_seconds"),
        (["hydra.sweeper.pruner.best=0"], "hydra.sweeper.pruner.best=0: must be a number of trials, 1 or more"),
    ],
)
def test_it_is_refused_where_it_could_lose_a_winner(typed: list[str], said: str, answer: Answer) -> None:
    refused = answer("-m", "hydra/sweeper=morphtrain", "hydra/sweeper/pruner=overtaken", "model.width=4,6", *typed)
    assert refused.startswith(said) and "\n" not in refused
