"""Ratios of the response to the first arm's, paired by seed: what an arm costs or saves, whatever the seed costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphtrain.evidence import drawing, words
from morphtrain.evidence.analyses import values
from morphtrain.evidence.comparisons import RATIO
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.pictures import Picture
from morphtrain.evidence.repeats import paired_ratio
from morphtrain.evidence.section import Section

if TYPE_CHECKING:
    import pandas as pd


def section(experiment: Experiment, table: pd.DataFrame) -> Section:
    """The ratio of each arm to the first with its test, and the difference of accuracy beside it."""
    metric = experiment.response
    found = values.last(experiment, table, metric)
    ratios = values.compared(found, RATIO)
    if not ratios:
        return values.too_few(experiment, metric, found)
    reference, what, spoken = next(iter(found)), words.metric(metric), values.spoken(ratios)
    better = f" ({direction})" if (direction := words.better(metric)) else ""
    drawn = {arm: ratio for arm in ratios if (ratio := paired_ratio(found[arm], found[reference])) is not None}
    return Section(
        answer=f"{words.sentence(what)}, as a multiple of that of {reference}{better}: {spoken}.",
        test=values.test_text(RATIO),
        tables=(
            values.comparison_table("ratios", metric, found, RATIO),
            *values.accuracy_tables(experiment, table),
        ),
        picture=Picture(
            title=f"{words.sentence(what)} of each arm, as a multiple of that of {reference}.",
            description=f"A dot an arm with its 95 % interval, on a log scale: {spoken}. Strokes are the seeds.",
            draw=lambda axes: drawing.ratios(axes, drawn, reference, what),
            size=(7.0, 1.4 + 0.5 * len(drawn)),
        ),
    )
