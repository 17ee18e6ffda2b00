"""The pictures of the analyses, on axes of matplotlib; told apart by marker and line, not by colour alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from morphtrain.evidence.regressions import Prediction
from morphtrain.evidence.repeats import Estimate
from morphtrain.evidence.style import (
    INK,
    PAPER,
    RULE,
    SERIES,
    SMALL,
    label_ends,
    label_y,
    log_ticks,
    looks,
    shortened,
    whole_epochs,
)

Point = tuple[Estimate, Estimate]  # of x and y
LONG = 60  # characters of all names below an axis, from which on they would cover one another


def against_seconds(
    axes: Any, dense: Mapping[str, Point], curve: Sequence[tuple[float, float]], methods: Mapping[str, Point]
) -> None:
    """Accuracy against seconds: the dense curve, its arms, and methods with the intervals of both.

    Args:
        curve: of the dense network, seconds and accuracy, from left to right.
    """
    axes.set_xscale("log")
    axes.plot(
        *zip(*curve, strict=True),
        color=INK,
        linestyle="-",
        linewidth=1.4,
        label="dense, as good as it gets in these seconds",
    )
    for name, (seconds, accuracy) in dense.items():
        _cross(axes, seconds, accuracy, color=INK, marker="o", markerfacecolor=PAPER, markersize=5)
        axes.annotate(name, (seconds.mean, accuracy.mean), xytext=(6, -12), textcoords="offset points", fontsize=SMALL)
    for place, (name, look) in enumerate(looks(methods).items()):  # hollow and of sizes: equal ones lie in each other
        hollow: dict[str, Any] = {"markerfacecolor": "none", "markersize": 7 + 3 * (len(methods) - 1 - place)}
        _cross(axes, *methods[name], color=look.color, marker=look.marker, label=shortened(name), **hollow)
    bottom, top = axes.get_ylim()
    x, y = zip(*curve, strict=True)
    axes.fill_between(x, y, max(top, max(y)), color=RULE, alpha=0.35, linewidth=0, label="here a method pays", zorder=0)
    axes.set_ylim(bottom, top)
    axes.set_xlabel("seconds of training (calibrated, log scale)")
    label_y(axes, "accuracy on the test images")
    log_ticks(axes.xaxis)
    axes.figure.legend(loc="outside lower center", ncols=2)


def ratios(axes: Any, found: Mapping[str, Estimate], reference: str, what: str) -> None:
    """A dot and an interval an arm, with the pairs themselves below it; 1 is as much as the reference."""
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=1, linestyle="-")
    _rows(axes, found)
    axes.set(xlabel=f"{what}, as a multiple of that of {shortened(reference)} (log scale)")
    log_ticks(axes.xaxis)


def differences(axes: Any, found: Mapping[str, Estimate], reference: str, what: str, worst: float) -> None:
    """A dot and an interval an arm, with the pairs themselves below it; 0 is as the reference, `worst` the margin."""
    axes.axvline(0, color=INK, linewidth=1, linestyle="-")
    axes.axvline(worst, color=INK, linewidth=1, linestyle="--")
    _rows(axes, found)
    axes.set(xlabel=f"{what}, less that of {shortened(reference)}")


def _rows(axes: Any, found: Mapping[str, Estimate]) -> None:
    """An arm a row: its mean and interval, and below them its values."""
    for row, (name, look) in enumerate(looks(found).items()):
        mean = found[name]
        axes.plot(mean.values, [row + 0.22] * mean.n, "|", color=INK, markersize=6, linewidth=0)
        _cross(axes, mean, Estimate((row,), row, None, None), color=look.color, marker=look.marker, markersize=8)
    axes.set_yticks(range(len(found)), [shortened(name) for name in found])
    axes.set_ylim(len(found) - 0.5, -0.5)


def boxes(axes: Any, groups: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> None:
    """A box a group, and every value in it as a point."""
    axes.boxplot(
        list(groups.values()),
        tick_labels=[shortened(name) for name in groups],
        widths=0.5,
        showfliers=False,
        **{f"{part}props": {"color": INK, "linestyle": "-"} for part in ("box", "whisker", "cap")},
        medianprops={"color": INK, "linestyle": "-", "linewidth": 2.4},
    )
    for place, (name, look) in enumerate(looks(groups).items(), 1):
        values = groups[name]
        spread = [place + 0.12 * (2 * i / max(len(values) - 1, 1) - 1) for i in range(len(values))]
        axes.plot(spread, values, look.marker, color=look.color, markersize=6)
    if sum(map(len, groups)) > LONG:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set_xlabel(xlabel)
    label_y(axes, ylabel)


def line(axes: Any, points: Sequence[tuple[float, float]], fit: Sequence[Prediction], labels: tuple[str, str]) -> None:
    """Points, the line through them, where it may lie, and where a further point may.

    Args:
        fit: of the line, from left to right.
    """
    x = [place.x for place in fit]
    axes.plot(*zip(*points, strict=True), "o", color=INK, label="runs")
    axes.plot(x, [place.mean for place in fit], "-", color=SERIES[0], label="least squares")
    for low, high, dashes, label in (
        ([p.low for p in fit], [p.high for p in fit], "--", "95 % confidence band of the line"),
        ([p.new_low for p in fit], [p.new_high for p in fit], ":", "95 % prediction band of a new run"),
    ):
        axes.plot(x, low, dashes, color=SERIES[0], linewidth=1.2, label=label)
        axes.plot(x, high, dashes, color=SERIES[0], linewidth=1.2)
    axes.set_xlabel(labels[0])
    label_y(axes, labels[1])
    axes.legend()


def curves(axes: Any, arms: Mapping[str, Sequence[tuple[float, Estimate]]], ylabel: str) -> None:
    """The mean of each arm over the epochs, and its interval as a band; arms are named where they end."""
    for name, look in looks(arms).items():
        x = [epoch for epoch, _ in arms[name]]
        means = [estimate.mean for _, estimate in arms[name]]
        low = [estimate.mean if estimate.low is None else estimate.low for _, estimate in arms[name]]
        high = [estimate.mean if estimate.high is None else estimate.high for _, estimate in arms[name]]
        axes.fill_between(x, low, high, color=look.color, alpha=0.18, linewidth=0)
        axes.plot(x, means, color=look.color, linestyle=look.linestyle, marker=look.marker, markevery=0.12, label=name)
    whole_epochs(axes)
    axes.set_xlabel("epoch")
    label_y(axes, ylabel)
    if not label_ends(axes, [(arms[name][-1][1].mean, name, look) for name, look in looks(arms).items()]):
        axes.legend(ncols=2)


def _cross(axes: Any, x: Estimate, y: Estimate, **look: Any) -> None:
    """A mark at the means, with the intervals of x and y where there are any."""
    ends = [None if e.low is None or e.high is None else [[e.mean - e.low], [e.high - e.mean]] for e in (x, y)]
    axes.errorbar([x.mean], [y.mean], xerr=ends[0], yerr=ends[1], linestyle="none", capsize=3, elinewidth=1.2, **look)
