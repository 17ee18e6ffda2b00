"""What is searched: options with keys of their own, shares of the config's values, and what typed keys do to them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from conftest import Answer
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import morphtrain
from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.sweep.sampler import SearchedTrials
from morphtrain.sweep.search_space import SearchSpace, as_space, branches_of

PARAMS = {
    "prune": {
        "none": {},
        "prunetrain": {"prune.lasso_ratio": "tag(log,interval(1.0,20.0))", "prune.interval": "range(1,6)"},
        "morphnet": {"prune.lasso_ratio": "tag(log,interval(2.0,4.0))", "prune.stop_epoch": 9},
    },
    "precision": "o0,bf16",
}
CONFIG: Any = OmegaConf.create(
    {
        "epochs": 30,
        "model": {"width": 16},
        "optimizer": {"lr": 0.1},
        "hydra": {"runtime": {"choices": {"prune": "none", "precision": "o0"}}},
    }
)


def space(*typed: str, params: Mapping[str, Any] = PARAMS, shares: Mapping[str, Any] | None = None) -> SearchSpace:
    return SearchSpace([*as_space(params), *typed], None, CONFIG, branches_of(params), shares)


def suggested(searched: SearchSpace, **values: Any) -> dict[str, str]:
    """The overrides of a trial that a user has queued with these values (`__` for a dot), by key."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial({key.replace("__", "."): value for key, value in values.items()})
    return dict(override.split("=", 1) for override in searched.suggest(study.ask()))


def test_an_options_own_keys_exist_only_with_it() -> None:
    assert suggested(space(), prune="none", precision="o0") == {"prune": "none", "precision": "o0"}
    found = suggested(space(), prune="prunetrain", precision="o0", prune__lasso_ratio=3.5)
    assert found.keys() == {"prune", "precision", "prune.lasso_ratio", "prune.interval"}
    assert found["prune.lasso_ratio"] == "3.5" and int(found["prune.interval"]) in range(1, 6)
    found = suggested(space(), prune="morphnet", prune__lasso_ratio=3.5)
    assert found.keys() == {"prune", "precision", "prune.lasso_ratio", "prune.stop_epoch"}
    assert found["prune.stop_epoch"] == "9", "which is not searched, but the option's"


@pytest.mark.parametrize("value", [1.0, 19.0])
def test_the_study_can_give_an_option_only_what_is_searched_with_it(value: float) -> None:
    """1 and 19 are in the range that another option has."""
    with pytest.raises(UserError, match=r"prune\.lasso_ratio=.*: must be what this sweep searches"):
        suggested(space(), prune="morphnet", precision="o0", prune__lasso_ratio=value)
    with pytest.raises(UserError, match="not searched"):
        suggested(space(), prune="custom", precision="o0")


def test_what_is_typed_replaces_what_a_preset_searches() -> None:
    fixed = space("prune=prunetrain", "prune.interval=3")
    assert suggested(fixed, precision="o0").keys() == {"prune", "prune.interval", "precision", "prune.lasso_ratio"}
    assert suggested(fixed, precision="o0")["prune.interval"] == "3"
    assert "prune" not in fixed.distributions
    narrowed = space("prune=none,prunetrain", "prune.interval=2,4")
    assert narrowed.distributions["prune"] == CategoricalDistribution(("none", "prunetrain"))
    assert "prune.interval" not in suggested(narrowed, prune="none"), "still a key of some options only"
    assert suggested(narrowed, prune="prunetrain")["prune.interval"] in ("2", "4")


@pytest.mark.parametrize("params", [{}, {"model.width": 8}])
def test_of_a_key_that_is_typed_twice_the_last_counts(params: Mapping[str, Any]) -> None:
    searched = space("model.width=8", "model.width=4,6", params=params)
    assert (list(searched.distributions), searched.fixed) == (["model.width"], [])
    fixed = space("model.width=4,6", "model.width=8", params=params)
    assert (fixed.distributions, fixed.fixed) == ({}, ["model.width=8"])


def test_shares_are_of_what_the_config_has() -> None:
    shares = {
        "epochs": "interval(0.2,1.0)",
        "model.width": "0.5,0.75,1",
        "optimizer.lr": "tag(log,interval(0.5,4.0))",
        "seed": None,
    }
    found = space("epochs=30", shares=shares)
    assert found.distributions["epochs"] == IntDistribution(6, 30)
    assert found.distributions["model.width"] == CategoricalDistribution((8, 12, 16))
    assert found.distributions["optimizer.lr"] == FloatDistribution(0.05, 0.4, log=True)
    assert "seed" not in found.distributions
    values = suggested(found, prune="none", epochs=7, model__width=12)
    assert (values["epochs"], values["model.width"]) == ("7", "12"), "what was typed is what it is a share of"
    assert space("epochs=10,20", shares=shares).distributions["epochs"] == CategoricalDistribution((10, 20))
    assert space(shares={"epochs": "range(0.5,1.1,0.25)"}).distributions["epochs"] == CategoricalDistribution(
        (15, 22, 30)
    )


def test_the_config_of_every_option_is_checked_before_any_trial() -> None:
    """At the low and at the high end of what is searched with it."""
    corners = [dict(o.split("=", 1) for o in alternatives[0]) for alternatives in space().corners()]
    assert [corner["prune"] for corner in corners] == [
        *("none", "morphnet"),
        *("none", "none", "prunetrain", "prunetrain", "morphnet", "morphnet"),
    ]
    ends = [corner["prune.lasso_ratio"] for corner in corners if corner["prune"] == "prunetrain"]
    assert ends == ["1.0", "20.0"]
    assert all(("prune.stop_epoch" in corner) == (corner["prune"] == "morphnet") for corner in corners)


def test_what_is_too_little_for_a_short_run_may_do_for_a_long_one() -> None:
    """An end of an option's own range is checked with both ends of all others, that of the same side first."""
    found = space(shares={"epochs": "interval(0.2,1.0)"}).corners()
    asked = [[dict(o.split("=", 1) for o in corner) for corner in alternatives] for alternatives in found]
    pruned = [[(c["prune.interval"], c["epochs"]) for c in alternatives] for alternatives in asked[4:6]]
    assert pruned == [[("1", "6"), ("1", "30")], [("5", "30"), ("5", "6")]]
    assert [len(alternatives) for alternatives in found[:2]] == [1, 1]
    typed = [
        dict(o.split("=", 1) for o in corner)
        for corners in space("prune=none,morphnet").corners()
        for corner in corners
    ]
    assert {corner["prune"] for corner in typed} == {"none", "morphnet"}, "no others are searched"


def test_a_typed_range_replaces_a_value_that_only_an_option_has() -> None:
    typed = space("prune.stop_epoch=7,8")
    assert suggested(typed, prune="none", precision="o0").keys() == {"prune", "precision"}
    assert suggested(typed, prune="morphnet", prune__lasso_ratio=3.5)["prune.stop_epoch"] in ("7", "8")


def test_the_values_of_a_baseline_are_those_of_its_option() -> None:
    assert space().defaults() == {"prune": "none", "precision": "o0"}
    assert space(shares={"epochs": "interval(0.2,1.0)"}).defaults()["epochs"] == 30


def test_tpe_models_the_keys_of_an_option_together() -> None:
    """Without groups it would model only keys that all trials have, and draw the others one by one."""
    with pytest.warns(optuna.exceptions.ExperimentalWarning, match="``group``"):
        sampler = optuna.samplers.TPESampler(seed=1, group=True, n_startup_trials=5)
    study = optuna.create_study(sampler=SearchedTrials(sampler))
    searched, together = space(), set()
    for _ in range(14):
        trial = study.ask()
        searched.suggest(trial)
        if "prune.interval" in trial.params:
            together |= set(trial.relative_params)
        study.tell(trial, trial.params.get("prune.interval", 3))
    assert {"prune", "precision", "prune.lasso_ratio", "prune.interval"} <= together


SWEEP = ("-m", "hydra/sweeper=morphtrain", "tracking=none")
WRONG = {
    "no number": (["+hydra.sweeper.shares={model: 0.5}"], "hydra.sweeper.shares.model=0.5: must be shares above 0"),
    "a share of text": (
        ['+hydra.sweeper.shares={device: "0.5,1"}'],
        "device=auto: must be a number above 0, since hydra.sweeper.shares.device searches shares of it",
    ),
    "no share": (
        ['+hydra.sweeper.shares={epochs: "interval(-0.5,1)"}'],
        "hydra.sweeper.shares.epochs=interval(-0.5,1): must be shares above 0 to search",
    ),
    "another key of an option": (
        ['+hydra.sweeper.params={prune: {none: {}, prunetrain: {prune.intervall: "1,2"}}}'],
        "prune.intervall=2: the chosen option of prune has no such key; did you mean prune.interval?",
    ),
    "a value of an option": (
        ['+hydra.sweeper.params={prune: {none: {}, prunetrain: {prune.interval: "range(0,4)"}}}'],
        "prune.interval=0: must be",
    ),
    "one key in two ways": (
        ["+hydra.sweeper.params={prune: {prunetrain: {prune.interval: '1,2'}, morphnet: {prune.interval: '1,3'}}}"],
        "hydra.sweeper.params.prune.morphnet.prune.interval=CategoricalDistribution(choices=(1, 3)): must be",
    ),
    "no keys": (
        ["+hydra.sweeper.params={prune: {none: 3}}"],
        "hydra.sweeper.params.prune.none=3: must be keys with what to search",
    ),
    "no options": (["+hydra.sweeper.params={prune: {}}"], "hydra.sweeper.params.prune={}: must be options"),
    "a grid": (
        [
            '+hydra.sweeper.params={prune: {none: {}, prunetrain: {prune.interval: "1,2"}}}',
            "hydra/sweeper/sampler=grid",
        ],
        "hydra/sweeper/sampler=grid: only trials with prune=prunetrain have prune.interval",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_space_that_cannot_be_searched_is_refused(case: str, answer: Answer) -> None:
    typed, said = WRONG[case]
    refused = answer(*SWEEP, *typed)
    assert refused.startswith(said), refused
    assert "\n" not in refused


@pytest.mark.parametrize("epochs", [15, 30])
def test_the_ends_of_what_fastest_searches_are_configs(epochs: int) -> None:
    """A fifth of the epochs, of which a tenth is less than one, has all methods."""
    with initialize_config_dir(str(schema.CONF)):
        config = hydra_compose("config", overrides=["+sweep=fastest", f"epochs={epochs}"], return_hydra_config=True)
    sweeper = config.hydra.sweeper
    searched = SearchSpace(as_space(sweeper.params), None, config, branches_of(sweeper.params), sweeper.shares)
    target = ["objective=[calibrated_time_to_accuracy]", "timing.target_accuracy=0.9"]
    for corner in itertools.chain(*searched.corners()):
        morphtrain.compose(*corner, *target)
