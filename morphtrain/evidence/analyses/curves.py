"""A metric over the epochs, arm by arm, and what is left of the differences at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphtrain.evidence import drawing, words
from morphtrain.evidence.analyses import values
from morphtrain.evidence.comparisons import DIFFERENCE
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.pictures import Picture
from morphtrain.evidence.repeats import Estimate, estimate
from morphtrain.evidence.section import Section

if TYPE_CHECKING:
    import pandas as pd

OVER_EPOCHS = {values.ACCURACY: "val_accuracy"}  # in the last record alone, and what every epoch has instead


def section(experiment: Experiment, table: pd.DataFrame) -> Section:
    """The differences to the first arm at the end with their tests, and the curves that lead there."""
    metric = experiment.response
    found = values.last(experiment, table, metric)
    changes = values.compared(found, DIFFERENCE)
    if not changes:
        return values.too_few(experiment, metric, found)
    spoken = values.spoken(changes)
    return Section(
        answer=f"At the end, {words.metric(metric)} differs from that of {next(iter(found))} by {spoken}.",
        test=f"{values.test_text(DIFFERENCE)} The bands of the picture are Student's intervals of each epoch alone.",
        tables=(
            values.comparison_table("ends", metric, found, DIFFERENCE),
            *values.accuracy_tables(experiment, table),
        ),
        picture=_picture(OVER_EPOCHS.get(metric, metric), experiment, table, spoken),
    )


def _picture(metric: str, experiment: Experiment, table: pd.DataFrame, spoken: str) -> Picture | None:
    if metric not in table:
        return None
    arms = {arm: means for arm in experiment.arms if (means := _means(table[table["arm"] == arm], metric))}
    what = words.metric(metric)
    return Picture(
        title=f"{words.sentence(what)} over the epochs: means over the seeds, and their 95 % intervals as bands.",
        description=f"A line an arm. At the end they differ from the first by {spoken}.",
        draw=lambda axes: drawing.curves(axes, arms, what),
    )


def _means(rows: pd.DataFrame, metric: str) -> list[tuple[float, Estimate]]:
    """The mean of each epoch, over the seeds that have it."""
    known = rows.dropna(subset=[metric])
    return [(float(epoch), estimate(list(found))) for epoch, found in known.groupby("epoch")[metric]]
