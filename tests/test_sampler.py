"""Samplers: they have Optuna's settings, a baseline does not blind them, and workers keep out of each other's way."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import Answer
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_method, instantiate
from omegaconf import OmegaConf
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, TPESampler
from optuna.trial import Trial

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.sweep.sampler import SearchedTrials, make_sampler
from morphtrain.sweep.study import Plan, SharedStudy
from morphtrain.sweep.workers import Worker

SAMPLERS = ("tpe", "gp", "nsgaii", "nsgaiii", "qmc", "random", "grid")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def node(*overrides: str) -> Any:
    """The config of the sweeper's sampler."""
    with initialize_config_dir(str(schema.CONF)):
        config = compose("config", ["hydra/sweeper=morphtrain", *overrides], return_hydra_config=True)
    return config.hydra.sweeper.sampler


def made(*overrides: str) -> Any:
    return instantiate(node(*overrides), _execution_whitelist_=("optuna.samplers.*",))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_setting_is_optunas_own_default(name: str) -> None:
    """Hydra's plug-in turns two of TPE's off; a later one might turn off others."""
    settings = dict(node(f"hydra/sweeper/sampler={name}"))
    target = settings.pop("_target_")
    sampler = get_class(target) if target.startswith("optuna.") else type(get_method(target)())
    defaults = {key: value.default for key, value in inspect.signature(sampler.__init__).parameters.items()}
    assert {key: value for key, value in settings.items() if key != "_partial_" and defaults[key] != value} == {}


def test_tpe_models_keys_together_and_keeps_away_from_running_trials() -> None:
    sampler = made()
    assert type(sampler) is TPESampler, "it is the default"
    assert sampler._constant_liar
    assert sampler._is_multivariate(optuna.create_study())
    assert not sampler._is_multivariate(optuna.create_study(directions=["minimize", "maximize"])), "Optuna's own choice"
    given = made("hydra.sweeper.sampler.multivariate=false", "hydra.sweeper.sampler.seed=3")
    assert not given._is_multivariate(optuna.create_study())
    same = made("hydra.sweeper.sampler.seed=3")
    assert given._rng.rng.rand() == same._rng.rng.rand()


def choose(trial: Trial) -> None:
    """Values of two keys; trial 0 is a baseline without any."""
    if trial.number > 0:
        trial.suggest_float("a", 0, 1)
        trial.suggest_float("b", 0, 1)


def value(trial: Trial) -> float:
    """The distance to the optimum, squared."""
    return (trial.params["a"] - 0.3) ** 2 + (trial.params["b"] - 0.6) ** 2 if trial.params else 9.0


@pytest.mark.parametrize(
    "sampler",
    [TPESampler(seed=1), GPSampler(seed=1), NSGAIISampler(seed=1, population_size=4), QMCSampler(seed=1)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_baseline_without_searched_values_does_not_blind_a_sampler(sampler: BaseSampler) -> None:
    study = optuna.create_study(sampler=SearchedTrials(sampler))
    study.enqueue_trial({})
    together = set()
    for _ in range(16):
        trial = study.ask()
        choose(trial)
        together |= set(trial.relative_params)
        study.tell(trial, value(trial))
    assert together == {"a", "b"}, "both are drawn from what the sampler has learned of both"


def distances(directory: Path, seed: int, constant_liar: bool) -> list[float]:
    """Between all pairs of six values that two workers of a study of fifteen trials try at the same time."""
    directory.mkdir()
    plan = Plan("shared", f"sqlite:///{directory}/study.db", ["minimize"], {}, 1000, {})
    samplers = [TPESampler(seed=seed + i, constant_liar=constant_liar) for i in range(2)]
    studies = [SharedStudy(plan, SearchedTrials(sampler), optuna.pruners.NopPruner()) for sampler in samplers]
    samplers[1]._rng.rng.seed(seed)  # the one that joined has drawn a seed of its own
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(s.storage, directory / str(i), 100)) for i, s in enumerate(studies)]
        for _ in range(15):
            (trial,) = studies[0].take(workers[0], 1, choose)
            studies[0].complete(workers[0], trial, [value(trial)])
        running = [studies[i % 2].take(workers[i % 2], 1, choose)[0].params for i in range(6)]
    pairs = itertools.combinations(running, 2)
    return [((x["a"] - y["a"]) ** 2 + (x["b"] - y["b"]) ** 2) ** 0.5 for x, y in pairs]


def test_workers_of_a_study_do_not_try_almost_the_same(tmp_path: Path) -> None:
    for seed in range(2):
        assert min(distances(tmp_path / f"liar{seed}", seed, constant_liar=True)) > 0.08
        assert min(distances(tmp_path / f"none{seed}", seed, constant_liar=False)) < 0.08, "as it was"


def test_values_are_chosen_while_no_other_worker_chooses(tmp_path: Path) -> None:
    """Between two workers' choices lies the first one's storing its values, or the second would not know them."""
    plan = Plan("shared", f"sqlite:///{tmp_path}/study.db", ["minimize"], {}, 1000, None)
    begun, seen = threading.Event(), []

    def slowly(trial: Trial) -> None:
        begun.set()
        threading.Event().wait(0.3)
        trial.suggest_float("a", 0, 1)

    def look(trial: Trial) -> None:
        others = [other for other in trial.study.get_trials(deepcopy=False) if other.number != trial.number]
        seen.extend(other.params for other in others)

    def work() -> None:
        study = SharedStudy(plan, TPESampler(), optuna.pruners.NopPruner())
        with Worker(study.storage, tmp_path / "first", 100) as worker:
            study.take(worker, 1, slowly)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(30)
    study = SharedStudy(plan, TPESampler(), optuna.pruners.NopPruner())
    with Worker(study.storage, tmp_path / "second", 100) as worker:
        study.take(worker, 1, look)
    thread.join()
    assert [set(params) for params in seen] == [{"a"}]


def test_a_worker_that_joins_an_empty_study_does_not_draw_the_same(tmp_path: Path) -> None:
    plan = Plan("shared", f"sqlite:///{tmp_path}/study.db", ["minimize"], {}, 1000, None)
    samplers = [optuna.samplers.RandomSampler(seed=1) for _ in range(2)]
    for sampler in samplers:
        SharedStudy(plan, sampler, optuna.pruners.NopPruner())
    assert samplers[0]._rng.rng.rand() != samplers[1]._rng.rng.rand()


def test_a_trial_whose_values_cannot_be_chosen_is_given_back(tmp_path: Path) -> None:
    study = SharedStudy(
        Plan("shared", f"sqlite:///{tmp_path}/study.db", ["minimize"], {}, 2, None),
        TPESampler(),
        optuna.pruners.NopPruner(),
    )

    def fail(trial: Trial) -> None:
        raise KeyError("of the user's own search space")

    with Worker(study.storage, tmp_path, 100) as worker:
        with pytest.raises(KeyError):
            study.take(worker, 1, fail)
        assert [trial.state.name for trial in study.trials] == ["WAITING"]


class Middle(BaseSampler):
    """A sampler of somebody's own: the middle of each range."""

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def infer_relative_search_space(self, study: optuna.Study, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: optuna.Study, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return param_distribution.low + self.share * (param_distribution.high - param_distribution.low)


def middle(**keys: Any) -> BaseSampler:
    """As one would load a sampler of OptunaHub's."""
    return Middle(**keys)


def nothing() -> str:
    return "a sampler"


@pytest.mark.parametrize("target", ["Middle", "middle"])
def test_a_sampler_of_ones_own_is_named_by_its_path(target: str) -> None:
    sampler = make_sampler(OmegaConf.create({"_target_": f"test_sampler.{target}", "share": 0.25}))
    study = optuna.create_study(sampler=SearchedTrials(sampler))
    trial = study.ask()
    choose(trial)
    trial = study.ask()
    choose(trial)
    assert trial.params == {"a": 0.25, "b": 0.25}


NO_SAMPLERS = {
    "os.system": "is of Python's own module os",
    "test_sampler.Path": "is of Python's own module pathlib",
    "test_sampler.Plan": "must be a subclass of optuna.samplers.BaseSampler, or a function that makes one",
    "test_sampler.SAMPLERS": "must be a subclass of",
    "test_sampler.nothing": "makes a str, not an optuna.samplers.BaseSampler",
    "test_sampler.Midle": "module 'test_sampler' has no attribute 'Midle'",
    "no_such_package.Sampler": "No module named 'no_such_package'",
    "sampler": "Empty module name",
    "optuna.samplers.NoSampler": "",
}


@pytest.mark.parametrize("target", NO_SAMPLERS)
def test_what_is_no_sampler_is_refused_in_a_line(target: str) -> None:
    said = rf"^hydra\.sweeper\.sampler\._target_={target}: {NO_SAMPLERS[target]}"
    with pytest.raises(UserError, match=said) as refused:
        make_sampler(OmegaConf.create({"_target_": target}))
    assert "\n" not in str(refused.value)


def test_keys_that_a_sampler_does_not_have_are_refused_in_a_line() -> None:
    with pytest.raises(UserError, match=r"^hydra\.sweeper\.sampler\._target_=test_sampler\.Middle: .*shre") as refused:
        make_sampler(OmegaConf.create({"_target_": "test_sampler.Middle", "shre": 1}))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"^hydra\.sweeper\.sampler=much: must be a node with a _target_"):
        make_sampler("much")


SOME_KEYS = '+hydra.sweeper.params={prune: {none: {}, prunetrain: {prune.interval: "range(1,4)"}}}'


@pytest.mark.parametrize("name", ["gp", "qmc"])
def test_a_sampler_that_cannot_learn_of_some_trials_keys_is_refused(name: str, answer: Answer) -> None:
    said = answer("-m", "hydra/sweeper=morphtrain", "tracking=none", SOME_KEYS, f"hydra/sweeper/sampler={name}")
    assert said == (
        f"hydra/sweeper/sampler={name}: only trials with prune=prunetrain have prune.interval, and this sampler would "
        "draw such keys at random; grouped_tpe works"
    )


def test_the_gaussian_process_keeps_to_the_accuracy_that_is_asked_for() -> None:
    """The least lies where trials are infeasible. A baseline without values has a constraint, as all trials do."""
    study = optuna.create_study(sampler=SearchedTrials(GPSampler(seed=0, n_startup_trials=6)))
    study.enqueue_trial({})
    for _ in range(16):
        trial = study.ask()
        choose(trial)
        a = trial.params.get("a", 1.0)
        trial.set_constraint("val_accuracy", 0.5 - a)
        study.tell(trial, a)
    learned = [trial.params["a"] for trial in study.trials[-6:]]
    assert sum(0.4 < a < 0.65 for a in learned) >= 4, learned
    assert 0.5 <= study.best_value < 0.6
