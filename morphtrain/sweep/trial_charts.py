"""Trials as points: how the search went, and what each trial gives up of one objective for another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from morphtrain.evidence import style, words
from morphtrain.evidence.style import INK, SERIES
from morphtrain.sweep.attributes import FIRST, Attributes
from morphtrain.sweep.comparison import completed, is_feasible
from morphtrain.wording import counted

MOST_NUMBERED = 12  # trials; more numbers than these would cover one another


class Kind(NamedTuple):
    """Trials that are drawn alike."""

    name: str
    marker: str
    color: str
    filled: bool
    trials: list[FrozenTrial]


def kinds(study: optuna.Study) -> list[Kind]:
    """The trials with a result by what they count: each is in the first kind that it belongs to."""
    baseline = Kind("baseline", "s", INK, True, [])
    infeasible = Kind("infeasible", "v", SERIES[4], False, [])
    contended = Kind("contended", "X", SERIES[1], True, [])
    other = Kind("trial", "o", SERIES[0], True, [])
    for trial in completed(study):
        told = Attributes(trial)
        if told.baseline is not None:
            baseline.trials.append(trial)
        elif not is_feasible(trial):
            infeasible.trials.append(trial)
        else:
            (contended if told.contended else other).trials.append(trial)
    return [kind for kind in (baseline, infeasible, contended, other) if kind.trials]


def history(axes: Any, study: optuna.Study, objective: str) -> None:
    """The first objective of every trial, and the best so far of those that are feasible.

    Args:
        study: trials whose values can be compared.
        objective: the name of the first.
    """
    down = study.directions[0] == StudyDirection.MINIMIZE

    def cost(trial: FrozenTrial) -> float:
        return trial.values[0] if down else -trial.values[0]

    feasible = [trial for trial in completed(study) if is_feasible(trial)]
    if feasible:
        best = accumulate((trial.values[0] for trial in feasible), min if down else max)
        places = [trial.number for trial in feasible]
        axes.plot(
            places, list(best), color=INK, linestyle="-", linewidth=1.2, drawstyle="steps-post", label="best so far"
        )
    for kind in kinds(study):
        _points(axes, kind, [(trial.number, trial.values[0]) for trial in kind.trials])
    for trial in completed(study):
        _named(axes, trial, (trial.number, trial.values[0]))
    style.whole_epochs(axes)
    axes.set(xlabel="trial", xlim=(-0.6, len(study.get_trials(deepcopy=False)) - 0.4))
    style.label_y(axes, f"{words.metric(objective)} ({'less' if down else 'more'} is better)")
    axes.set_title(_found(objective, min(feasible, key=cost) if feasible else None))
    axes.figure.legend(loc="outside lower center", ncols=5)


def _found(objective: str, best: FrozenTrial | None) -> str:
    if best is None:
        return f"{objective} of every trial: none is feasible"
    return f"{objective} of every trial: the best is trial {best.number} with {words.number(best.values[0])}"


def pareto(axes: Any, study: optuna.Study, objective: Sequence[str]) -> None:
    """Two objectives against each other, with the trials that no other one beats in both."""
    front = sorted(study.best_trials, key=lambda trial: trial.values[0])
    points = [(trial.values[0], trial.values[1]) for trial in front]
    if points:  # otherwise none is feasible
        axes.plot(*zip(*points, strict=True), color=INK, linestyle="--", linewidth=1.2, label="Pareto front", zorder=1)
        axes.plot(*zip(*points, strict=True), "o", color=INK, markerfacecolor="none", markersize=12)
    for kind in kinds(study):
        _points(axes, kind, [(trial.values[0], trial.values[1]) for trial in kind.trials])
    for trial in front if len(front) <= MOST_NUMBERED else ():
        _said(axes, f"{trial.number}", trial.values[:2], (8, 6))
    for trial in completed(study):
        _named(axes, trial, (trial.values[0], trial.values[1]))
    x, y = (
        f"{words.metric(name)} ({'less' if direction == StudyDirection.MINIMIZE else 'more'} is better)"
        for name, direction in zip(objective, study.directions, strict=True)
    )
    axes.set_xlabel(x)
    style.label_y(axes, y)
    numbers = ", with their numbers" if len(front) <= MOST_NUMBERED else ""
    axes.set_title(f"The Pareto front: {len(front)} of {counted(len(completed(study)), 'trial')} (circled{numbers})")
    axes.figure.legend(loc="outside lower center", ncols=5)


def _points(axes: Any, kind: Kind, places: Sequence[tuple[float, float]]) -> None:
    face = kind.color if kind.filled else "none"
    axes.plot(*zip(*places, strict=True), kind.marker, color=kind.color, markerfacecolor=face, label=kind.name)


def _named(axes: Any, trial: FrozenTrial, place: tuple[float, float]) -> None:
    """A baseline with a name of its own is called by it."""
    name = Attributes(trial).baseline
    if name is not None and name != FIRST:
        _said(axes, style.shortened(name), place, (6, -12))


def _said(axes: Any, text: str, place: Sequence[float], offset: tuple[float, float]) -> None:
    axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=style.SMALL)
