"""The pictures: trials keep their numbers, nothing covers the title, and what was disturbed is marked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from matplotlib import pyplot
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from morphtrain import interrupts
from morphtrain.evidence.plots import run_figure
from morphtrain.sweep import charts
from morphtrain.sweep.attributes import BASELINE_ATTR
from morphtrain.sweep.comparison import compared


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
    _, seconds, size = run_figure(history, {"params": 1000, "macs": 1000}).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in size.lines}
    assert drawn["params"] == ([0, 1, 2, 3], [1.0, 0.5, 0.5, 0.5]), "already the first epoch pruned it"
    assert drawn["macs"][1] == [1.0, 0.25, 0.25, 0.25]
    times = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in seconds.lines}
    assert times == {"undisturbed": ([1, 3], [1.0, 3.0]), "contended": ([2], [2.0])}
    assert [text.get_text() for text in seconds.get_legend().get_texts()] == ["undisturbed", "contended"]


def test_a_signal_ends_the_drawing(study: optuna.Study, tmp_path: Path) -> None:
    with pytest.raises(interrupts.Interrupted), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        charts.draw(study, study, ["train_seconds"], tmp_path, [])
    assert list(tmp_path.iterdir()) == []
