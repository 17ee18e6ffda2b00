"""How much each searched key matters: two questions with two answers, and a line where there is no telling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from matplotlib import pyplot
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from morphtrain.sweep import charts
from morphtrain.sweep.importance import BEST, fanova, importances, ped_anova

SPACE = {"x": FloatDistribution(0, 1), "y": CategoricalDistribution(("a", "b")), "z": FloatDistribution(0, 1)}
Value = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def study(
    value: Value, count: int = 60, excess: Value = lambda params: -1.0, directions: tuple[str, ...] = ("minimize",)
) -> optuna.Study:
    made = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=3))
    for _ in range(count):
        trial = made.ask(SPACE)
        trial.set_constraint("val_accuracy", excess(trial.params))
        made.tell(trial, value(trial.params))
    return made


def split(params: dict[str, Any]) -> float:
    """Half of the values of y are bad, of which everybody knows; among the others x decides."""
    return params["x"] + (100.0 if params["y"] == "b" else 0.0)


def test_what_varies_most_is_not_what_makes_the_best() -> None:
    made = study(split)
    over_all, best = importances(made, ["train_seconds"])
    assert max(over_all.shares, key=lambda key: over_all.shares[key]) == "y"
    assert max(best.shares, key=lambda key: best.shares[key]) == "x"
    for found in (over_all, best):
        assert sum(found.shares.values()) == pytest.approx(1)
        assert list(found.shares.values()) == sorted(found.shares.values(), reverse=True)
    assert str(over_all).startswith("importance for train_seconds (fANOVA of 60 trials): y ")
    assert str(best).startswith("importance for being among the best 5 (PED-ANOVA of 60 trials): x 0.")


def test_shares_of_the_best_are_optunas_own_without_constraints() -> None:
    made = study(split)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST / 60)
    assert ped_anova(made, ["train_seconds"]).shares == pytest.approx(get_param_importances(made, evaluator=evaluator))


def test_infeasible_trials_are_not_the_best() -> None:
    """They are the fastest here, all at the same z; how fast does not matter."""

    def fast(seconds: float) -> optuna.Study:
        cheats: Value = lambda params: 1.0 if params["z"] > 0.8 else -1.0  # noqa: E731
        return study(lambda params: seconds if cheats(params) > 0 else split(params), excess=cheats)

    found = [ped_anova(fast(seconds), ["train_seconds"]).shares for seconds in (-5.0, 1e6)]
    assert found[0] == pytest.approx(found[1])
    assert found[0]["x"] > found[0]["z"]
    blind = get_param_importances(fast(-5.0), evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST / 60))
    assert blind["z"] > blind["x"], "which is what it would say"


def test_keys_that_only_some_trials_have_count_for_being_among_the_best() -> None:
    made = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(60):
        trial = made.ask({"prune": CategoricalDistribution(("none", "early")), "x": FloatDistribution(0, 1)})
        own = trial.suggest_float("prune.target", 0, 1) if trial.params["prune"] == "early" else 5.0
        made.tell(trial, own)
    assert set(fanova(made, ["macs"]).shares) == {"prune", "x"}
    best = ped_anova(made, ["macs"]).shares
    assert set(best) == {"prune", "x", "prune.target"}
    assert min(best["prune"], best["prune.target"]) > best["x"]


def test_with_two_metrics_the_best_are_those_of_the_front() -> None:
    """Each metric alone asks for one end of x; the front for all of x, and for small z."""

    def both(params: dict[str, Any]) -> list[float]:
        return [params["x"] + 3 * params["z"], params["x"] - 3 * params["z"]]

    made = study(both, directions=("minimize", "maximize"))
    over_all, best = importances(made, ["train_seconds", "val_accuracy"])
    assert str(over_all).startswith("importance for train_seconds (fANOVA of 60 trials): ")
    assert str(best).startswith("importance for being among the best 5 by Pareto front (PED-ANOVA of 60 trials): z ")


@pytest.mark.parametrize("count", range(0, 13))
def test_few_trials_are_said_to_be_few(count: int) -> None:
    found = importances(study(split, count), ["train_seconds"])
    assert len(found) == (2 if count else 0)
    for one, fewest in zip(found, (4, 10), strict=count > 0):
        assert bool(one.shares) == (count >= fewest)
        assert "\n" not in str(one)
        if count < fewest:
            assert str(one).startswith("no importance for ")
            assert f"it takes {fewest}" in str(one)


def test_too_few_feasible_trials_are_no_best_ones() -> None:
    made = study(split, 20, excess=lambda params: 1.0)
    assert str(ped_anova(made, ["train_seconds"])) == (
        "no importance for being among the best 5 (PED-ANOVA of 20 trials): "
        "it takes 10 trials or more, 5 of them feasible; 0 of these are"
    )


def test_equal_values_tell_nothing() -> None:
    for found in importances(study(lambda params: 3.0, 20), ["macs"]):
        assert not found.shares
        assert "\n" not in str(found)


def test_one_key_has_no_share() -> None:
    made = optuna.create_study()
    for width in range(4, 20):
        trial = made.ask({"model.width": IntDistribution(width, width)})
        made.tell(trial, float(width))
    assert importances(made, ["macs"]) == []


def test_both_are_drawn_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = study(split, 20)
    found = importances(made, ["train_seconds"])
    kept: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda *_: kept.append(pyplot.gcf()) or pyplot.figure())
    paths = charts.draw(made, made, ["train_seconds"], tmp_path, found)
    figure = kept[[path.stem for path in paths].index("importance")]
    close("all")
    (axes,) = figure.axes
    keys = [label.get_text() for label in axes.get_yticklabels()]
    for bars, one in zip(axes.containers, found, strict=True):
        assert dict(zip(keys, [bar.get_width() for bar in bars], strict=True)) == pytest.approx(one.shares)
        rows = [bar.get_y() + bar.get_height() / 2 for bar in bars]
        assert all(abs(row - at) < 0.5 for at, row in enumerate(rows)), "beside their key"
    monkeypatch.setattr(pyplot, "close", close)
    few = charts.draw(made, made, ["train_seconds"], tmp_path / "", importances(study(split, 3), ["train_seconds"]))
    assert "importance" not in [path.stem for path in few]
