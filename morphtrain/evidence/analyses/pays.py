"""Does a method pay: is it more accurate than the best the dense network gives for the same seconds?

The dense network can be stopped sooner or be made narrower; its runs form a curve of accuracy against seconds. Each
seed has its own curve, at which each of its methods is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from morphtrain.evidence import drawing, words
from morphtrain.evidence.analyses import values
from morphtrain.evidence.analyses.values import ACCURACY
from morphtrain.evidence.comparisons import DIFFERENCE
from morphtrain.evidence.experiment import CURVE, Experiment
from morphtrain.evidence.frontier import (
    CANNOT_TELL,
    OUTLOOK,
    PAYS,
    ROUNDING,
    Point,
    Verdict,
    judge,
    mean,
    on_curve,
    read,
)
from morphtrain.evidence.margins import pairs_within
from morphtrain.evidence.pictures import Picture
from morphtrain.evidence.repeats import LEAST_FOR_INTERVAL, Estimate, estimate, geometric, paired_ratio, share
from morphtrain.evidence.savings import Savings, savings
from morphtrain.evidence.section import Section, Table
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

SECONDS = "calibrated_train_seconds"
METHODS = "methods"  # the table that the front page collects
PLACES = 200  # of the drawn curve
Runs = Mapping[str, Mapping[int, Point]]  # by arm and seed
TEST = (
    "For each seed, the accuracies of the dense arms are joined to a curve, linear in the logarithm of seconds; an arm "
    "whose mean is no better than that of a faster one is left out. A method's accuracy less the curve's at its "
    "seconds is one difference a seed, and Student's t gives the 95 % interval of their mean. Pays: the interval is "
    "above 0. Does not pay: it is below the margin of {margin:g}. Otherwise it cannot be told yet. A method faster "
    "than every dense arm has no curve to be read at, one slower than all is read at the best of them, and a seed "
    "without all dense arms has no curve. The dense network that is as accurate as a method lies between two arms "
    "of the curve, by their means; a one-sided test at 5 % shows whether the method is no worse by the margin. Means "
    "of seconds are geometric, with the interval of the logarithms; an interval of accuracies ends at 0 and 1. "
    f"{OUTLOOK}"
)


@dataclass(frozen=True)
class Method:
    """A method beside the dense network, over the seeds at which it is judged."""

    seconds: Estimate
    ratio: Estimate  # of seconds to the first arm's
    accuracy: Estimate
    dense: Estimate  # the curve's accuracy in these seconds
    ahead: Estimate
    savings: Savings  # against the dense network that is as accurate
    judged: Verdict

    @property
    def verdict(self) -> str:
        """In words, with what would tell if it cannot be told yet."""
        return "; ".join(filter(None, (self.judged.verdict, self.judged.doubt, self.judged.outlook)))


def section(experiment: Experiment, table: pd.DataFrame) -> Section:
    """The verdict on each method, and the dense curve that it is read against."""
    runs = runs_of(experiment, table)
    found = judged_methods(experiment, runs)
    if not found:
        there = {arm: {seed: point.seconds for seed, point in seeds.items()} for arm, seeds in runs.items()}
        return values.too_few(experiment, f"{SECONDS} and {ACCURACY}", there)
    unjudged = [_unjudged(experiment, arm, runs) for arm in _arms(experiment, "method") if arm not in found]
    beyond = [f"{arm}: {len(m.judged.beyond)} of {m.ahead.n}" for arm, m in found.items() if m.judged.beyond]
    longer = f" Seeds in which a method was slower than every dense arm: {words.listed(beyond)}." if beyond else ""
    return Section(
        answer=" ".join([_answer(found), *unjudged]),
        test=TEST.format(margin=experiment.margin) + longer,
        tables=(
            _methods(found),
            _savings(experiment, found),
            _dense(experiment, runs),
            *_from_scratch(experiment, runs),
        ),
        picture=_picture(experiment, found, runs),
        is_open=bool(unjudged) or any(method.judged.verdict == CANNOT_TELL for method in found.values()),
    )


def judged_methods(experiment: Experiment, runs: Runs) -> dict[str, Method]:
    """The methods that can be judged, those with two seeds or more at which they can be read against a curve."""
    arms = _arms(experiment, "method")
    return {arm: method for arm in arms if (method := _method(experiment, arm, runs)) is not None}


def runs_of(experiment: Experiment, table: pd.DataFrame) -> Runs:
    """Every run that has both seconds and an accuracy."""
    seconds, accuracy = (values.last(experiment, table, metric) for metric in (SECONDS, ACCURACY))
    return {
        arm: {seed: Point(x, accuracy[arm][seed]) for seed, x in seconds[arm].items() if seed in accuracy[arm]}
        for arm in seconds
    }


def _arms(experiment: Experiment, *roles: str) -> list[str]:
    return [name for name, arm in experiment.arms.items() if arm.role in roles]


def _curves(experiment: Experiment, runs: Runs) -> dict[int, dict[str, Point]]:
    """The dense runs of each seed in which every dense arm has finished."""
    dense = _arms(experiment, *CURVE)
    complete = [seed for seed in experiment.seeds if all(seed in runs[name] for name in dense)]
    return {seed: {name: runs[name][seed] for name in dense} for seed in complete}


def _unjudged(experiment: Experiment, arm: str, runs: Runs) -> str:
    """Why a method is not in the table."""
    seeds = [seed for seed in _curves(experiment, runs) if seed in runs[arm]]
    if len(seeds) < values.LEAST_SEEDS:
        return f"Not judged: {arm}, with {counted(len(seeds), 'seed')} beside a full curve."
    return f"Not judged: {arm}, which was faster than every dense arm, so that there is nothing to compare it with."


def _method(experiment: Experiment, arm: str, runs: Runs) -> Method | None:
    judged = judge(runs[arm], curves := _curves(experiment, runs), experiment.margin)
    if len(judged.reached) < values.LEAST_SEEDS:
        return None
    first = runs[next(iter(experiment.arms))]
    ratio = paired_ratio(
        {seed: runs[arm][seed].seconds for seed in judged.reached},
        {seed: point.seconds for seed, point in first.items()},
    )
    assert judged.ahead is not None and ratio is not None  # there are seeds
    seconds, accuracy = _means(runs[arm], list(judged.reached))
    saved = savings({seed: runs[arm][seed] for seed in judged.reached}, curves)
    reached = estimate(list(judged.reached.values()))
    return Method(seconds, ratio, accuracy, reached, judged.ahead, saved, judged)


def _means(points: Mapping[int, Point], seeds: Sequence[int]) -> tuple[Estimate, Estimate]:
    """Of seconds and of accuracy."""
    return geometric([points[s].seconds for s in seeds]), share([points[s].accuracy for s in seeds])


def _answer(found: Mapping[str, Method]) -> str:
    paying = sum(method.judged.verdict == PAYS for method in found.values())
    parts = [f"{arm} {method.judged.verdict} ({_spoken(method)})" for arm, method in found.items()]
    verb = "pays" if 1 in (paying, len(found)) else "pay"
    return (
        f"{paying} of {counted(len(found), 'method')} {verb} against the dense network at equal seconds: "
        f"{words.listed(parts)}."
    )


def _spoken(method: Method) -> str:
    ahead = words.interval(method.ahead.mean, method.ahead.low, method.ahead.high, signed=True)
    return f"{ahead} of test accuracy in {words.number(method.seconds.mean)} s, n = {counted(method.ahead.n, 'seed')}"


def _methods(found: Mapping[str, Method]) -> Table:
    import pandas as pd

    rows = {
        arm: {
            "verdict": method.verdict,
            **values.columns("difference", method.ahead),
            "n": method.ahead.n,
            **values.columns("seconds", method.seconds),
            **values.columns("of the dense seconds", method.ratio),
            **values.columns("accuracy", method.accuracy),
            "dense accuracy in these seconds": method.dense.mean,
        }
        for arm, method in found.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return Table(METHODS, "Each method, and the best of the dense network for the same seconds.", frame)


def _savings(experiment: Experiment, found: Mapping[str, Method]) -> Table:
    """Each method beside the dense network of its own accuracy, which may cost far less than the full run."""
    import pandas as pd

    rows = {
        arm: {
            "dense network of this accuracy": " to ".join(method.savings.arms),
            **values.columns("of its seconds", method.savings.seconds),
            **values.columns("accuracy less its", method.savings.accuracy),
            f"not {experiment.margin:g} worse": _no_worse(method.savings, experiment.margin),
            "n": method.savings.seconds.n,
        }
        for arm, method in found.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return Table("savings", "Each method, and the dense network that is as accurate.", frame)


def _no_worse(found: Savings, margin: float) -> str:
    """Whether the method is shown to be less than the margin below the dense network, by a one-sided test at 5 %."""
    if found.accuracy.n < LEAST_FOR_INTERVAL:
        return f"takes {LEAST_FOR_INTERVAL} seeds"
    if max(found.accuracy.values) - min(found.accuracy.values) < ROUNDING:
        return "shown" if found.accuracy.mean > -margin else "not shown"
    within = pairs_within(found.ours, found.theirs, DIFFERENCE, below=margin, names=("method", "dense"))
    return f"{'shown' if within.shown else 'not shown'} ({words.p_value(within.p)})"


def _dense(experiment: Experiment, runs: Runs) -> Table:
    import pandas as pd

    points = _points(_arms(experiment, *CURVE), runs)
    rows = {
        arm: {**values.columns("seconds", x), **values.columns("accuracy", y), "n": x.n}
        for arm, (x, y) in points.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("dense arm")
    return Table("dense", "The dense network: in full, stopped sooner, and narrower.", frame)


def _points(arms: Sequence[str], runs: Runs) -> dict[str, tuple[Estimate, Estimate]]:
    """Mean seconds and accuracy of each arm that has runs."""
    return {arm: _means(runs[arm], list(runs[arm])) for arm in arms if runs[arm]}


def _from_scratch(experiment: Experiment, runs: Runs) -> list[Table]:
    """Methods against their own final structures, trained from fresh weights for the methods' seconds."""
    import pandas as pd

    rows = {}
    for arm in _arms(experiment, "from_scratch"):
        of = experiment.arms[arm].of
        assert of is not None  # Arm checks it
        seeds = [seed for seed in runs[of] if seed in runs[arm]]
        if len(seeds) >= values.LEAST_SEEDS:
            seconds, accuracy = _means(runs[arm], seeds)
            ahead = estimate([runs[of][seed].accuracy - runs[arm][seed].accuracy for seed in seeds])
            rows[of] = {
                "accuracy from fresh weights": accuracy.mean,
                "in seconds": seconds.mean,
                **values.columns("the method is ahead by", ahead),
                "n": len(seeds),
            }
    if not rows:
        return []
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return [Table("from-scratch", "Each method against the structure that it ends with, from fresh weights.", frame)]


def _picture(experiment: Experiment, found: Mapping[str, Method], runs: Runs) -> Picture:
    import numpy as np

    dense = _points(_arms(experiment, *CURVE), runs)
    curves = _curves(experiment, runs)
    means = [mean([curves[seed][arm] for seed in curves]) for arm in on_curve(curves)]
    seconds = [point.seconds for point in means] + [x.mean for x, _ in dense.values()]
    places = np.geomspace(min(seconds), max(seconds), PLACES)
    curve = [(float(x), y) for x in places if (y := read(means, x)) is not None]
    methods = {arm: (method.seconds, method.accuracy) for arm, method in found.items()}
    spoken = "; ".join(f"{arm}: {words.number(x.mean)} s, {words.number(y.mean)}" for arm, (x, y) in dense.items())
    return Picture(
        title="Accuracy against seconds: means over the seeds with 95 % intervals; a method pays above the line.",
        description=f"{_answer(found)} The dense arms: {spoken}.",
        draw=lambda axes: drawing.against_seconds(
            axes, dense, curve, methods | _points(_arms(experiment, "from_scratch"), runs)
        ),
        size=(7.0, 4.8),
    )
