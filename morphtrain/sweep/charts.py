"""Optuna's own charts of a sweep, as PNG."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna

from morphtrain import interrupts
from morphtrain.sweep import importance_chart
from morphtrain.sweep.importance import Importance


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
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as charts

    several = len(objective) > 1
    first: dict[str, Any] = {"target": lambda trial: trial.values[0], "target_name": objective[0]} if several else {}
    named = first or {"target_name": objective[0]}
    wanted: dict[str, Callable[[], Any]] = {
        "history": lambda: charts.plot_optimization_history(study, **named),
        "parallel": lambda: _legible(charts.plot_parallel_coordinate(searched, **named)),
        "slices": lambda: charts.plot_slice(searched, **named),
    }
    if told := [found for found in importances if found.shares]:
        wanted["importance"] = lambda: importance_chart.bars(pyplot.subplots(figsize=(8.0, 4.8))[1], told)
    if several:
        wanted["pareto"] = lambda: charts.plot_pareto_front(study, target_names=list(objective))
    paths = []
    with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna sets a style for good
        warnings.simplefilter("ignore")  # these charts are experimental; all values of an axis are equal
        for name, drawn in wanted.items():
            interrupts.check()
            drawn()
            paths.append(directory / f"{name}.png")
            figure: Any = pyplot.gcf()
            figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
            pyplot.close("all")
    return paths


def _legible(axes: Any) -> Any:
    """Parallel coordinates in colours that show on white, with the legend beside the title instead of on it."""
    for lines in axes.collections:
        lines.set_cmap("viridis" if lines.get_cmap().name.endswith("_r") else "viridis_r")  # the best are the darkest
    axes.figure.set_size_inches(10, 5)
    axes.set_title("")
    axes.set_title("Parallel coordinates", loc="left", y=1.03)
    return axes
