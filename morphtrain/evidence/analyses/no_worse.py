"""Is an arm no worse than the first one by the margin (non-inferiority), paired by seed?

That two arms do not differ significantly does not show it. The interval of their difference does, where it ends before
the margin, which was stated before the runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from morphtrain.evidence import drawing, words
from morphtrain.evidence.analyses import values
from morphtrain.evidence.comparisons import DIFFERENCE, Comparison, compare_pairs
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.frontier import CANNOT_TELL
from morphtrain.evidence.margins import pairs_within
from morphtrain.evidence.pictures import Picture
from morphtrain.evidence.repeats import LEAST_FOR_INTERVAL, Estimate
from morphtrain.evidence.section import Section, Table
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

NO_WORSE, WORSE = "no worse", "worse"
LEVEL = 0.025  # of the one-sided test, so that the interval of 95 % shows its result
TEST = (
    "Non-inferiority: differences to {reference} paired by seed, with Student's 95 % interval. No worse: the interval "
    "ends before {margin:g} on the worse side, which is a one-sided t test at 2.5 %, whose p is given. Worse: it lies "
    "beyond. Otherwise it cannot be told yet. Each arm is a question of its own, so nothing is corrected for their "
    "number."
)


@dataclass(frozen=True)
class Judged:
    """An arm beside the first one; `p` is that of being worse by the margin or more, NaN where nothing scatters."""

    difference: Comparison
    p: float
    verdict: str


def section(experiment: Experiment, table: pd.DataFrame) -> Section:
    """The verdict on each arm, with the interval that it follows from."""
    metric = experiment.response
    found = values.last(experiment, table, metric)
    judged = judged_arms(experiment, found)
    if not judged:
        return values.too_few(experiment, metric, found, LEAST_FOR_INTERVAL)
    reference = next(iter(found))
    return Section(
        answer=_answer(experiment, judged, reference),
        test=TEST.format(reference=reference, margin=experiment.margin),
        tables=(_table(metric, found, judged), *values.accuracy_tables(experiment, table)),
        picture=_picture(experiment, judged, reference),
        is_open=len(judged) < len(found) - 1 or any(arm.verdict == CANNOT_TELL for arm in judged.values()),
    )


def judged_arms(experiment: Experiment, found: Mapping[str, values.BySeed]) -> dict[str, Judged]:
    """Every later arm against the first, over the seeds of both; arms with fewer than three of them are left out."""
    first, *later = found
    arms = [arm for arm in later if len(found[arm].keys() & found[first].keys()) >= LEAST_FOR_INTERVAL]
    return {arm: _judged(experiment, (arm, first), found[arm], found[first]) for arm in arms}


def _judged(experiment: Experiment, names: tuple[str, str], ours: values.BySeed, theirs: values.BySeed) -> Judged:
    compared = compare_pairs(ours, theirs, DIFFERENCE, names=names)
    p = math.nan
    if compared.p is not None:  # differences scatter
        side = "below" if _more_is_better(experiment.response) else "above"
        p = pairs_within(ours, theirs, DIFFERENCE, **{side: experiment.margin}, names=names, level=LEVEL).p
    return Judged(compared, p, verdict(compared, experiment.response, experiment.margin))


def verdict(difference: Comparison, metric: str, margin: float) -> str:
    """NO_WORSE, WORSE or CANNOT_TELL, by the interval of a difference of this metric."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return CANNOT_TELL
    least, most = (-high, -low) if _more_is_better(metric) else (low, high)  # how much worse it is
    return NO_WORSE if most < margin else WORSE if least > margin else CANNOT_TELL


def _more_is_better(metric: str) -> bool:
    return words.better(metric) == words.MORE


def _answer(experiment: Experiment, judged: Mapping[str, Judged], reference: str) -> str:
    counts = Counter(arm.verdict for arm in judged.values())
    parts = [f"{arm} {found.verdict} ({_spoken(found)})" for arm, found in judged.items()]
    verb = "is" if 1 in (counts[NO_WORSE], len(judged)) else "are"
    return (
        f"{counts[NO_WORSE]} of {counted(len(judged), 'arm')} {verb} shown to be no worse than {reference} by "
        f"{experiment.margin:g} of {words.metric(experiment.response)}: {words.listed(parts)}."
    )


def _spoken(found: Judged) -> str:
    difference = found.difference
    effect = words.interval(difference.effect, difference.low, difference.high, signed=True)
    return f"{effect}, n = {counted(difference.n[0], 'seed')}"


def _table(metric: str, found: Mapping[str, values.BySeed], judged: Mapping[str, Judged]) -> Table:
    import pandas as pd

    rows = {
        arm: {
            **values.columns(metric, values.mean(metric, DIFFERENCE, list(seeds.values()))),
            "seeds": len(seeds),
            **(_columns(judged[arm]) if arm in judged else {}),
        }
        for arm, seeds in found.items()
        if seeds
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")
    caption = (
        f"{words.sentence(words.metric(metric))}: means over the seeds, and the difference to {next(iter(found))}."
    )
    return Table("no-worse", caption, frame)


def _columns(found: Judged) -> dict[str, Any]:
    return {
        **values.columns(DIFFERENCE, found.difference),
        "pairs": found.difference.n[0],
        "one-sided p": found.p,
        "verdict": found.verdict,
    }


def _picture(experiment: Experiment, judged: Mapping[str, Judged], reference: str) -> Picture:
    what, drawn = words.metric(experiment.response), {arm: _estimate(found) for arm, found in judged.items()}
    worst = -experiment.margin if _more_is_better(experiment.response) else experiment.margin
    spoken = "; ".join(f"{arm} {_spoken(found)}" for arm, found in judged.items())
    return Picture(
        title=f"{words.sentence(what)} of each arm less that of {reference}; dashed: worse by the margin.",
        description=f"A dot an arm with its 95 % interval: {spoken}. Strokes are the seeds.",
        draw=lambda axes: drawing.differences(axes, drawn, reference, what, worst),
        size=(7.0, 1.4 + 0.5 * len(drawn)),
    )


def _estimate(found: Judged) -> Estimate:
    """The differences as the picture takes them."""
    difference = found.difference
    return Estimate(tuple(difference.samples[0].tolist()), difference.effect, difference.low, difference.high)
