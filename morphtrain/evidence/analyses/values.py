"""Values of arms by seed, comparisons with the first arm, and what is said where there are too few of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from morphtrain.evidence import words
from morphtrain.evidence.comparisons import DIFFERENCE, RATIO, Comparison, compare_pairs, least_pairs
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.records import ends
from morphtrain.evidence.repeats import LEAST_FOR_INTERVAL, Estimate, estimate, geometric, share
from morphtrain.evidence.section import Section, Table
from morphtrain.evidence.variance import corrected
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

ACCURACY = "test_accuracy"
LEAST_SEEDS = 2  # one run does not say how far another would be from it
MOST_IN_A_SENTENCE = 4  # arms; the table has all
TO_ACCURACY = "time_to_accuracy"  # seconds
SHARES = ("accuracy", "density")  # from 0 to 1
TEST = (
    "t test paired by seed{of_logs}, with Student's 95 % interval; beside it the bootstrap's (BCa), and Wilcoxon's "
    "signed ranks. All p are corrected for the number of comparisons (Holm), intervals are not. With fewer "
    f"than {least_pairs()} pairs significance is out of reach and no p is given, with fewer than {LEAST_FOR_INTERVAL} "
    "there is no interval either."
)

BySeed = dict[int, float]


def last(experiment: Experiment, table: pd.DataFrame, metric: str) -> dict[str, BySeed]:
    """A metric of the last record of each run, by arm and seed, in the order of the declaration; finite values only."""
    found: dict[str, BySeed] = {arm: {} for arm in experiment.arms}
    if metric not in table:
        return found
    for row in ends(table).to_dict("records"):
        if row["arm"] in found and math.isfinite(row[metric]):
            found[row["arm"]][int(row["seed"])] = float(row[metric])
    return found


def scale(metric: str) -> str:
    """How values of a metric are compared: shares and losses by differences, times and sizes by ratios."""
    return DIFFERENCE if is_share(metric) or metric.endswith("loss") else RATIO


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1."""
    return metric.endswith(SHARES) and not metric.endswith(TO_ACCURACY)


def mean(metric: str, scale: str, found: Sequence[float]) -> Estimate:
    """Over the seeds, as the scale has it; the interval of a share ends at 0 and 1."""
    if scale == RATIO:
        return geometric(found)
    return share(found) if is_share(metric) else estimate(found)


def compared(found: Mapping[str, BySeed], scale: str) -> dict[str, Comparison]:
    """Every later arm against the first, paired by seed; arms with fewer than two seeds in common are left out."""
    first, *later = found
    arms = [arm for arm in later if len(found[arm].keys() & found[first].keys()) >= LEAST_SEEDS]
    pairs = [compare_pairs(found[arm], found[first], scale, names=(arm, first)) for arm in arms]
    return dict(zip(arms, corrected(pairs), strict=True)) if pairs else {}


def comparison_table(name: str, metric: str, found: Mapping[str, BySeed], scale: str) -> Table:
    """A row an arm: its mean over the seeds, and the comparison with the first arm."""
    import pandas as pd

    comparisons = compared(found, scale)
    rows = {
        arm: {**columns(metric, mean(metric, scale, list(seeds.values()))), "seeds": len(seeds)}
        | (tested(comparisons[arm]) if arm in comparisons else {})
        for arm, seeds in found.items()
        if seeds
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")
    kind = "geometric means" if scale == RATIO else "means"
    caption = f"{words.sentence(words.metric(metric))}: {kind} over the seeds, and the {scale} to {next(iter(found))}."
    return Table(name, caption, frame)


def accuracy_tables(experiment: Experiment, table: pd.DataFrame) -> list[Table]:
    """The accuracies compared, beside a response that is none."""
    found = last(experiment, table, ACCURACY)
    if experiment.response == ACCURACY or not compared(found, DIFFERENCE):
        return []
    return [comparison_table("accuracy", ACCURACY, found, DIFFERENCE)]


def tested(found: Comparison) -> dict[str, float]:
    """A comparison as columns; without p where no effect could be significant with so few pairs."""
    bootstrap = (math.nan, math.nan) if found.bootstrap is None else found.bootstrap
    p, rank_p = (math.nan if p is None or found.out_of_reach else p for p in (found.p, found.rank_p))
    return {
        **columns(found.scale, found),
        "pairs": found.n[0],
        "BCa": found.effect,
        **{f"BCa {end}": value for end, value in zip(("low", "high"), bootstrap, strict=True)},
        "p": p,
        "Wilcoxon p": rank_p,
    }


def columns(name: str, found: Estimate | Comparison) -> dict[str, float]:
    """A value and its interval as the columns `name`, `name low` and `name high`."""
    value = found.mean if isinstance(found, Estimate) else found.effect
    low, high = (math.nan if end is None else end for end in (found.low, found.high))
    return {name: value, f"{name} low": low, f"{name} high": high}


def too_few(experiment: Experiment, metric: str, found: Mapping[str, BySeed], least: int = LEAST_SEEDS) -> Section:
    """A section that says what is missing, instead of numbers: `least` seeds of each arm are needed."""
    there = [f"{arm} {len(seeds)} of {len(experiment.seeds)}" for arm, seeds in found.items()]
    answer = (
        f"Nothing can be said yet: it takes {counted(least, 'seed')} of the arms that are compared, finished "
        f"and with {metric}. There are: {words.listed(there)}."
    )
    return Section(answer, "None, with so few runs.")


def test_text(scale: str) -> str:
    """What the p and intervals of a comparison are."""
    return TEST.format(of_logs=", of the logarithms of the ratios" if scale == RATIO else "")


def spoken(found: Mapping[str, Comparison]) -> str:
    """`0.69 [0.66, 0.72] with prune (n = 5 seeds)` for each arm, or for the lowest and the highest of many."""
    arms: Sequence[str] = list(found)
    if len(arms) > MOST_IN_A_SENTENCE:
        ordered = sorted(arms, key=lambda arm: found[arm].effect)
        arms = [ordered[0], ordered[-1]]
    parts = [
        f"{words.interval(c.effect, c.low, c.high, signed=c.scale == DIFFERENCE)} with {arm} "
        f"(n = {counted(c.n[0], 'seed')})"
        for arm, c in ((arm, found[arm]) for arm in arms)
    ]
    if len(found) == len(arms):
        return words.listed(parts)
    return f"from {parts[0]} to {parts[1]}, of {counted(len(found), 'arm')}"
