"""The pictures of a sweep, as PNG: trials as points, and Optuna's own charts of the keys, all in MorphTrain's style."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna

from morphtrain import interrupts
from morphtrain.evidence import style, words
from morphtrain.sweep import importance_chart, trial_charts
from morphtrain.sweep.comparison import completed
from morphtrain.sweep.importance import Importance
from morphtrain.wording import counted

SIZE = (8.0, 4.8)  # inches
OPTUNAS_STYLE = "ggplot"  # which its charts choose by themselves


def draw(
    study: optuna.Study,
    searched: optuna.Study,
    objective: Sequence[str],
    directory: Path,
    importances: Sequence[Importance],
) -> list[Path]:
    """Write the charts to `directory` and return their paths.

    Args:
        study: all trials.
        searched: the same, without the baseline's result; its trials have the same numbers.
        objective: names of the metrics.
        importances: how much each key matters, by different methods.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as charts

    def axes() -> Any:
        return pyplot.subplots(figsize=SIZE, layout="constrained")[1]

    named: dict[str, Any] = {"target": lambda trial: trial.values[0]} if len(objective) > 1 else {}
    named["target_name"] = objective[0]
    wanted: dict[str, Callable[[], Any]] = {
        "history": lambda: trial_charts.history(axes(), study, objective[0]),
        "parallel": lambda: charts.plot_parallel_coordinate(searched, **named),
        "slices": lambda: charts.plot_slice(searched, **named),
    }
    if told := [found for found in importances if found.shares]:
        wanted["importance"] = lambda: importance_chart.bars(axes(), told)
    if len(objective) == 2:
        wanted["pareto"] = lambda: trial_charts.pareto(axes(), study, objective)
    elif len(objective) == 3:
        wanted["pareto"] = lambda: charts.plot_pareto_front(study, target_names=list(objective))
    paths = []
    with warnings.catch_warnings(), style.in_style(), style.in_place_of(OPTUNAS_STYLE):
        warnings.simplefilter("ignore")  # these charts are experimental; all values of an axis are equal
        for name, drawn in wanted.items():
            interrupts.check()
            drawn()
            figure: Any = pyplot.gcf()
            if name in LEGIBLE:
                LEGIBLE[name](figure, objective[0])
            paths.append(directory / f"{name}.png")
            style.save(figure, paths[-1], _told(name, study, objective), bbox_inches="tight")
            pyplot.close("all")
    return paths


def _parallel(figure: Any, objective: str) -> None:
    """In shades that show on white, with the legend beside the title instead of on it."""
    axes, *others = figure.axes
    for lines in axes.collections:
        down = lines.get_cmap().name.endswith("_r")
        lines.set_cmap(style.SHADES_DOWN if down else style.SHADES)  # the best are the darkest
        lines.set(clip_on=False, zorder=3)  # the axes end at the best and the worst
    for place in others:
        if place.get_yscale() == "log":
            style.log_ticks(place.yaxis)
        place.spines["right"].set_visible(True)  # the axis of a key
        place.grid(False)
    for place in figure.axes:
        place.spines["bottom"].set_visible(False)  # where the best may lie
    axes.grid(False)
    figure.set_size_inches(10, 5)
    axes.set_title("A line a trial; the best are the darkest", y=1.03)


def _slices(figure: Any, objective: str) -> None:
    """With shades that show on white, and with numbers that can be read on axes of logarithms."""
    for axes in figure.axes:
        axes.set_title("")
        for points in axes.collections[:1]:
            points.set_cmap(style.SHADES)
        if axes.get_xscale() == "log":
            style.log_ticks(axes.xaxis)
    figure.subplots_adjust(top=0.86)  # one key leaves the headline two lines
    style.headline(figure, f"{objective} by each key: a point a trial, later ones darker, infeasible ones pale")


LEGIBLE = {"parallel": _parallel, "slices": _slices}  # what Optuna has drawn made so


def _told(name: str, study: optuna.Study, objective: Sequence[str]) -> str:
    """A chart for those who cannot see it; its numbers are in the sweep's table and results."""
    about = words.listed([words.metric(metric) for metric in objective])
    trials = counted(len(completed(study)), "trial")
    return f"{TOLD[name]} {words.sentence(about)}, of {trials} with a result."


TOLD = {
    "history": "The objective of every trial in their order, and the best so far.",
    "parallel": "Parallel coordinates: a line a trial through its values of all keys, darker if it is better.",
    "slices": "The objective against each key, a point a trial.",
    "importance": "A bar a key and method: how much it matters for the objective.",
    "pareto": "The objectives against each other, a point a trial, with the Pareto front.",
}
