"""Does the response differ between the values of a factor: analysis of variance, then every pair (Holm)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from morphtrain.evidence import drawing, words
from morphtrain.evidence.analyses import values
from morphtrain.evidence.comparisons import DIFFERENCE, Comparison, compare_pairs
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.pictures import Picture
from morphtrain.evidence.repeats import LEAST_FOR_INTERVAL
from morphtrain.evidence.section import Section, Table
from morphtrain.evidence.variance import compare_blocks, corrected, nothing_to_test
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd


def section(experiment: Experiment, table: pd.DataFrame) -> Section:
    """The largest difference between two arms, the test of all arms, and every pair."""
    metric = experiment.response
    found = values.last(experiment, table, metric)
    scale = values.scale(metric)
    groups = {arm: seeds for arm, seeds in found.items() if len(seeds) >= values.LEAST_SEEDS}
    pairs = _pairs(groups, scale)
    if not pairs:
        return values.too_few(experiment, metric, found)
    return Section(
        answer=_answer(metric, groups, pairs),
        test=f"{_variance(groups, scale)} Pairs: {values.test_text(scale)}",
        tables=(
            values.comparison_table("arms", metric, found, scale),
            _pair_table(metric, pairs),
            *values.accuracy_tables(experiment, table),
        ),
        picture=_picture(experiment, groups),
    )


def _pairs(groups: Mapping[str, values.BySeed], scale: str) -> Sequence[Comparison]:
    """Every later arm against every earlier one, over the seeds of both, with Holm's correction."""
    pairs = [
        compare_pairs(groups[arm], groups[below], scale, names=(arm, below))
        for below, arm in combinations(groups, 2)
        if len(groups[arm].keys() & groups[below].keys()) >= values.LEAST_SEEDS
    ]
    return corrected(pairs) if pairs else []


def _answer(metric: str, groups: Mapping[str, values.BySeed], pairs: Sequence[Comparison]) -> str:
    largest = max(pairs, key=_distance)
    arm, below = largest.names
    if largest.scale != DIFFERENCE:
        of = f"{words.interval(largest.effect, largest.low, largest.high)} times"
    else:
        of = f"{words.interval(*_size(largest))} {'below' if largest.effect < 0 else 'above'}"
    p = "" if largest.p is None or largest.out_of_reach else f"; {words.p_value(largest.p)} after Holm's correction"
    return (
        f"Of {counted(len(groups), 'arm')}, {arm} and {below} are the farthest apart: {words.metric(metric)} with "
        f"{arm} is {of} that with {below} (n = {counted(largest.n[0], 'seed')}{p})."
    )


def _size(pair: Comparison) -> tuple[float, float | None, float | None]:
    """The effect without its sign, and its interval."""
    if pair.effect >= 0:
        return pair.effect, pair.low, pair.high
    return -pair.effect, None if pair.high is None else -pair.high, None if pair.low is None else -pair.low


def _distance(pair: Comparison) -> float:
    return abs(pair.effect) if pair.scale == DIFFERENCE else max(pair.effect, 1 / pair.effect)


def _variance(groups: Mapping[str, values.BySeed], scale: str) -> str:
    """The analysis of variance in words, or why there is none."""
    common = set.intersection(*(set(seeds) for seeds in groups.values()))
    if len(common) < LEAST_FOR_INTERVAL:
        return f"No analysis of variance: it takes {LEAST_FOR_INTERVAL} seeds of all arms, and there are {len(common)}."
    if alike := nothing_to_test(groups, scale):
        return f"No analysis of variance, with arms as groups and seeds as blocks: {alike}."
    found = compare_blocks(groups, scale)
    return (
        f"Analysis of variance over {counted(len(groups), 'arm')}, seeds as blocks (n = {len(common)}): arms "
        f"explain {words.interval(found.effect, found.low, found.high)} of the variance that seeds leave, "
        f"F({found.between:.0f}, {found.within:.0f}) = {found.f:.3g}, {words.p_value(found.p)}."
    )


def _pair_table(metric: str, pairs: Sequence[Comparison]) -> Table:
    import pandas as pd

    rows = {" against ".join(pair.names): values.tested(pair) for pair in pairs}
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("pair")
    return Table("pairs", f"{words.sentence(words.metric(metric))}: every pair of arms, paired by seed.", frame)


def _picture(experiment: Experiment, groups: Mapping[str, values.BySeed]) -> Picture:
    what = words.metric(experiment.response)
    data = {arm: list(seeds.values()) for arm, seeds in groups.items()}
    spoken = "; ".join(f"{arm} {words.number(min(v))} to {words.number(max(v))}" for arm, v in data.items())
    return Picture(
        title=f"{words.sentence(what)} by arm: median, quartiles, and every seed as a point.",
        description=f"A box an arm. Ranges over the seeds: {spoken}.",
        draw=lambda axes: drawing.boxes(axes, data, experiment.x or "arm", what),
    )
