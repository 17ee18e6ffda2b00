"""All arms of an experiment in one table: what each took, how good it became, and the verdict if there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from morphtrain.evidence.analyses import no_worse, pays, values
from morphtrain.evidence.analyses.values import ACCURACY, BySeed
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.repeats import paired_ratio
from morphtrain.evidence.section import Table
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

NAMES = {pays.SECONDS: "calibrated seconds", ACCURACY: "test accuracy"}


def summary(experiment: Experiment, table: pd.DataFrame) -> Table:
    """A row for each arm that has runs, in the order of the declaration.

    Calibrated seconds of training and their ratio to the first arm's, test accuracy, and what decides if it is neither;
    all are means over the seeds with 95 % intervals. Of a question about what pays, also each method's verdict, and its
    seconds as a share of those of the dense network that is as accurate; of one about what is no worse, the verdict.

    Args:
        table: of `records.load` of its runs, those that have finished.

    Raises:
        ValueError: for numbers that the statistics refuse.
    """
    import pandas as pd

    found = {m: values.last(experiment, table, m) for m in dict.fromkeys((*NAMES, experiment.response))}
    verdicts = _verdicts(experiment, table)
    counts = {arm: len({seed for metric in found.values() for seed in metric[arm]}) for arm in experiment.arms}
    alike = len(set(counts.values())) == 1
    rows = {
        arm: {**({} if alike else {"seeds": count}), **_means(arm, found), **verdicts.get(arm, {})}
        for arm, count in counts.items()
        if count
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").reindex(list(rows)).rename_axis("arm")
    over = counted(next(iter(counts.values())), "seed") if alike else "the seeds"
    return Table("summary", f"Means over {over} with 95 % intervals.", frame)


def _means(arm: str, found: Mapping[str, Mapping[str, BySeed]]) -> dict[str, float]:
    row: dict[str, float] = {}
    for metric, arms in found.items():
        if arms[arm]:
            mean = values.mean(metric, values.scale(metric), list(arms[arm].values()))
            row |= values.columns(NAMES.get(metric, metric), mean)
        if metric == pays.SECONDS:
            first = next(iter(arms))
            ratio = None if arm == first else paired_ratio(arms[arm], arms[first])
            row |= {f"of {first}'s": math.nan} if ratio is None else values.columns(f"of {first}'s", ratio)
    return row


def _verdicts(experiment: Experiment, table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Of each arm that is judged."""
    if experiment.analysis == "no_worse":
        judged = no_worse.judged_arms(experiment, values.last(experiment, table, experiment.response))
        return {arm: {"verdict": found.verdict} for arm, found in judged.items()}
    if experiment.analysis != "pays":
        return {}
    methods = pays.judged_methods(experiment, pays.runs_of(experiment, table))
    return {
        arm: {
            **values.columns("of an equally accurate dense network's", method.savings.seconds),
            "verdict": method.judged.verdict,
        }
        for arm, method in methods.items()
    }
