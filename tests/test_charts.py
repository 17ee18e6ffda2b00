"""The pictures: trials keep their numbers, nothing covers the title, and what was disturbed is marked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import pytest
from matplotlib import pyplot
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from PIL import Image

from morphtrain import interrupts
from morphtrain.evidence import style
from morphtrain.evidence.plots import draw_run
from morphtrain.sweep import charts, trial_charts
from morphtrain.sweep.attributes import BASELINE_ATTR, CONTENDED_ATTR
from morphtrain.sweep.comparison import compared
from morphtrain.sweep.importance import importances


@pytest.fixture
def study() -> optuna.Study:
    """A baseline, a failed trial, and ten others of which half are infeasible."""
    study = optuna.create_study(study_name="s")
    study.add_trial(optuna.trial.create_trial(value=9.0, user_attrs={BASELINE_ATTR: True}))
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
    for _ in range(10):
        trial = study.ask({key: FloatDistribution(0, 1) for key in "ab"})
        trial.set_constraint("val_accuracy", 0.1 if trial.number % 2 else -0.1)
        study.tell(trial, trial.params["a"] + 1.0)
    return study


@pytest.fixture
def figures(study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The figures of a sweep's charts by name, as they are saved."""
    kept: dict[str, Any] = {}
    close, comparison = pyplot.close, compared(study, ["train_seconds"])
    monkeypatch.setattr(pyplot, "close", lambda *_: kept.update({f"{len(kept)}": pyplot.gcf()}) or pyplot.figure())
    paths = charts.draw(comparison.study, comparison.searched, comparison.objective, tmp_path, [])
    yield {path.stem: figure for path, figure in zip(paths, kept.values(), strict=True)}
    close("all")


def test_trials_keep_their_numbers(figures: dict[str, Any], study: optuna.Study) -> None:
    feasible = {trial.params["a"]: trial.number for trial in study.trials if trial.number > 1 and trial.number % 2 == 0}
    points = figures["slices"].axes[0].collections[0]
    shown = {x: number for (x, _), number in zip(points.get_offsets(), points.get_array(), strict=True)}
    assert shown == pytest.approx(feasible)
    assert max(shown.values()) == 10


def test_the_best_line_at_the_end_of_the_axes_is_whole(figures: dict[str, Any]) -> None:
    axes = figures["parallel"].axes[0]
    assert not any(lines.get_clip_on() for lines in axes.collections)
    assert not any(place.spines["bottom"].get_visible() for place in figures["parallel"].axes)


def test_parallel_coordinates_are_legible(figures: dict[str, Any]) -> None:
    figure = figures["parallel"]
    figure.canvas.draw()
    axes = figure.axes[0]
    (lines,) = axes.collections
    assert lines.get_edgecolors()[:, :3].min(axis=1).max() < 0.6, "no line is white"
    legend = axes.get_legend().get_window_extent()
    titles = [axes.title, axes._left_title, axes._right_title]
    boxes = [title.get_window_extent() for title in titles if title.get_text()]
    assert boxes
    assert not any(box.overlaps(legend) for box in boxes)


def test_the_run_is_drawn_against_its_first_network_with_contended_epochs_marked() -> None:
    history = [
        {
            "epoch": epoch,
            "val_accuracy": 0.5,
            "epoch_seconds": float(epoch),
            "contended": float(epoch == 2),
            "params": 500.0,
            "macs": 250.0,
            "channel_density": 0.75,
        }
        for epoch in (1, 2, 3)
    ]
    with style.figure() as figure:
        draw_run(figure, history, {"params": 1000, "macs": 1000})
        _, seconds, size = figure.axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in size.lines}
    assert drawn["parameters"] == ([0, 1, 2, 3], [1.0, 0.5, 0.5, 0.5]), "already the first epoch pruned it"
    assert drawn["MACs"][1] == [1.0, 0.25, 0.25, 0.25]
    assert drawn["live channels"][1] == [1.0, 0.75, 0.75, 0.75]
    assert {text.get_text() for text in size.texts} == {"parameters 0.5", "MACs 0.25", "live channels 0.75"}
    times = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in seconds.lines}
    assert times == {
        "undisturbed": ([1, 3], [1.0, 3.0]),
        "warm-up": ([], []),
        "profiled": ([], []),
        "contended": ([2], [2.0]),
    }
    assert [text.get_text() for text in seconds.get_legend().get_texts()] == ["undisturbed", "contended"]


def test_a_signal_ends_the_drawing(study: optuna.Study, tmp_path: Path) -> None:
    with pytest.raises(interrupts.Interrupted), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        charts.draw(study, study, ["train_seconds"], tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_each_trial_is_drawn_once_as_what_it_counts(study: optuna.Study) -> None:
    study.add_trial(optuna.trial.create_trial(value=3.0, user_attrs={CONTENDED_ATTR: [2]}))
    found = {kind.name: [trial.number for trial in kind.trials] for kind in trial_charts.kinds(study)}
    assert found == {"baseline": [0], "infeasible": [3, 5, 7, 9, 11], "contended": [12], "trial": [2, 4, 6, 8, 10]}
    looks = [(kind.marker, kind.filled) for kind in trial_charts.kinds(study)]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_best_so_far_is_of_feasible_trials_only(direction: str) -> None:
    study = optuna.create_study(direction=direction)
    for value, excess in ((5.0, -1.0), (1.0, 1.0), (9.0, 1.0), (4.0, -1.0), (6.0, -1.0)):
        trial = study.ask()
        trial.set_constraint("val_accuracy", excess)
        study.tell(trial, value)
    with style.figure() as figure:
        axes = figure.subplots()
        trial_charts.history(axes, study, "train_seconds")
        (best,) = [line for line in axes.lines if line.get_label() == "best so far"]
        assert list(best.get_xdata()) == [0, 3, 4]
        assert list(best.get_ydata()) == ([5.0, 4.0, 4.0] if direction == "minimize" else [5.0, 5.0, 6.0])
        said = "trial 3 with 4" if direction == "minimize" else "trial 4 with 6"
        assert axes._left_title.get_text().endswith(said)
        assert ("less" if direction == "minimize" else "more") + " is better" in axes.get_ylabel()


def test_the_pareto_front_is_what_no_other_trial_beats() -> None:
    values = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (4.0, 0.95), (1.0, 0.4)]
    study = optuna.create_study(directions=["minimize", "maximize"])
    for pair in values:
        study.add_trial(optuna.trial.create_trial(values=list(pair)))
    with style.figure() as figure:
        axes = figure.subplots()
        trial_charts.pareto(axes, study, ["train_seconds", "val_accuracy"])
        (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
        assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [values[0], values[1], values[3]]
        assert {text.get_text() for text in axes.texts} == {"0", "1", "3"}
        assert "axis begins at" in axes.get_ylabel()


@pytest.mark.parametrize("trials", [1, 100])
def test_sweeps_of_any_size_are_drawn_in_one_style(trials: int, tmp_path: Path) -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    keys = {"prune.lasso_ratio": FloatDistribution(1, 20, log=True), "optimizer.lr": FloatDistribution(0, 1)}
    for number in range(trials):
        trial = study.ask(keys)
        study.tell(trial, [5.0 + number % 7, 0.9 + 0.01 * (number % 9)])
    before = {key: matplotlib.rcParams[key] for key in style.settings()}
    told = importances(study, ["train_seconds", "val_accuracy"])
    paths = charts.draw(study, study, ["train_seconds", "val_accuracy"], tmp_path, told)
    assert {path.stem for path in paths} >= {"history", "parallel", "slices", "pareto"}
    for path in paths:
        with Image.open(path) as picture:
            assert picture.text["Description"].startswith(charts.TOLD[path.stem])
            assert min(picture.size) > 200
            paper = picture.convert("RGB").getpixel((1, 1))
        assert "#{:02x}{:02x}{:02x}".format(*paper) == style.PAPER
    assert {key: matplotlib.rcParams[key] for key in before} == before
