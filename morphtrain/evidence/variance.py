"""Many groups of runs: do they differ at all (analysis of variance), and then which (each pair, corrected by Holm)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from morphtrain.evidence.comparisons import ROUNDING, Comparison, compare_groups, compare_pairs, scaled
from morphtrain.evidence.repeats import LEAST_FOR_INTERVAL


@dataclass(frozen=True)
class Variance:
    """An analysis of variance over groups, and the comparison of each later group with each earlier one.

    `effect` is eta^2: the share of the variance (in blocks: of what the blocks leave) that the groups explain in these
    runs; the interval from `low` to `high` is of the share that they would explain in all runs, which is less. `f` has
    `between` and `within` degrees of freedom. The p of the pairs are corrected by Holm.
    """

    names: tuple[str, ...]
    f: float
    between: float
    within: float
    p: float
    effect: float
    low: float
    high: float
    n: int
    blocked: bool
    confidence: float
    pairs: tuple[Comparison, ...]

    def __str__(self) -> str:
        kind = "in blocks" if self.blocked else "one way"
        first = (
            f"{len(self.names)} groups ({self.n} runs, {kind}): eta^2 = {self.effect:.4g} "
            f"[{self.low:.4g}, {self.high:.4g}], F({self.between:.0f}, {self.within:.0f}) = {self.f:.4g}, "
            f"p = {self.p:.2g}"
        )
        return "\n".join([first, *(f"  {pair}" for pair in self.pairs)])


def nothing_to_test(groups: Mapping[str, Any], scale: str) -> str:
    """Why groups, as `compare_blocks` or `compare_many` takes them, cannot be tested for being alike; "" if they can.

    Groups that are too small are not looked at.
    """
    blocked = all(isinstance(group, Mapping) for group in groups.values())
    values = _in_blocks(groups, scale) if blocked else [scaled(group, scale) for group in groups.values()]
    return "" if min(map(len, values)) < LEAST_FOR_INTERVAL else _alike(values, blocked)


def compare_blocks(groups: Mapping[str, Mapping[Any, float]], scale: str, confidence: float = 0.95) -> Variance:
    """Compare groups whose values belong together across the groups, by seed for instance (randomised blocks).

    Only what all groups have counts.

    Args:
        groups: values by block, by the group's name.
        scale: RATIO, for logarithms, or DIFFERENCE.

    Raises:
        ValueError: for fewer than two groups or three blocks, numbers that do not fit the scale, or values that do not
            scatter.
    """
    values = _in_blocks(groups, scale)
    _check(values, blocked=True)
    import pandas as pd
    from statsmodels.stats.anova import AnovaRM

    rows = [(n, m, x) for n, group in enumerate(values) for m, x in enumerate(group)]
    table = AnovaRM(pd.DataFrame(rows, columns=["group", "block", "y"]), "y", "block", ["group"]).fit().anova_table
    f, between, within = (float(table[column].iloc[0]) for column in ("F Value", "Num DF", "Den DF"))
    pairs = [
        compare_pairs(groups[b], groups[a], scale, names=(b, a), confidence=confidence)
        for a, b in combinations(groups, 2)
    ]
    return _variance(tuple(groups), f, between, within, len(rows), True, confidence, pairs)


def compare_many(groups: Mapping[str, Sequence[float]], scale: str, confidence: float = 0.95) -> Variance:
    """Compare independent groups of three runs or more; otherwise as `compare_blocks`."""
    values = [scaled(group, scale) for group in groups.values()]
    _check(values, blocked=False)
    from scipy import stats

    n = sum(map(len, values))
    pairs = [
        compare_groups(groups[b], groups[a], scale, names=(b, a), confidence=confidence)
        for a, b in combinations(groups, 2)
    ]
    f = float(stats.f_oneway(*values).statistic)
    return _variance(tuple(groups), f, len(values) - 1, n - len(values), n, False, confidence, pairs)


def corrected(pairs: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Comparisons of one family, with p and rank_p corrected by Holm (1979)."""
    by_t = _holm([pair.p for pair in pairs])
    by_rank = _holm([pair.rank_p for pair in pairs])
    return tuple(
        replace(pair, p=p, rank_p=rank_p, family=len(pairs))
        for pair, p, rank_p in zip(pairs, by_t, by_rank, strict=True)
    )


def _holm(found: Sequence[float | None]) -> list[float | None]:
    """A comparison without p is one of the family all the same, and counts as p = 1."""
    from statsmodels.stats.multitest import multipletests

    adjusted = multipletests([1.0 if p is None else p for p in found], method="holm")[1]
    return [None if p is None else float(value) for p, value in zip(found, adjusted, strict=True)]


def _in_blocks(groups: Mapping[str, Mapping[Any, float]], scale: str) -> list[Any]:
    """The values of each group in the blocks that all have, as arrays."""
    blocks = [key for key in next(iter(groups.values()), {}) if all(key in group for group in groups.values())]
    return [scaled([group[key] for key in blocks], scale) for group in groups.values()]


def _variance(
    names: tuple[str, ...],
    f: float,
    between: float,
    within: float,
    n: int,
    blocked: bool,
    confidence: float,
    pairs: Sequence[Comparison],
) -> Variance:
    import numpy as np
    from scipy import stats
    from statsmodels.stats.oneway import confint_effectsize_oneway

    share = f * between / (f * between + within)
    p = float(stats.f.sf(f, between, within))
    with np.errstate(divide="ignore"):  # an end at 0 is 1 / (1 + 1 / 0) there
        ends = confint_effectsize_oneway(f, (between, within), alpha=1 - confidence).eta2
    low, high = map(float, ends)
    if 1 - p < (1 + confidence) / 2:  # so small an F has no lower end of its own, and a tiny one no upper
        low = 0.0
    if 1 - p < (1 - confidence) / 2:
        high = 0.0
    return Variance(names, f, between, within, p, share, low, high, n, blocked, confidence, corrected(pairs))


def _check(values: Sequence[Any], blocked: bool) -> None:
    if len(values) < 2:
        raise ValueError(f"{len(values)} groups: must be two or more")
    if (least := min(map(len, values))) < LEAST_FOR_INTERVAL:
        raise ValueError(f"a group of {least} runs: must be {LEAST_FOR_INTERVAL} or more in each")
    if alike := _alike(values, blocked):
        raise ValueError(f"{alike}: there is nothing to test")


def _alike(values: Sequence[Any], blocked: bool) -> str:
    """What of the groups leaves nothing to test, in words; "" if they scatter."""
    import numpy as np

    every = np.concatenate(values)
    rounding = ROUNDING * abs(every).max()
    if np.ptp(every) <= rounding:
        return "all values are equal"
    if not blocked:
        exact = all(np.ptp(group) <= rounding for group in values)
        return "the values of each group are equal, so the differences between groups are exact" if exact else ""
    table = np.stack(values)
    between = table - table.mean(axis=0)  # what the blocks leave
    if abs(between - between.mean(axis=1, keepdims=True)).max() > rounding:
        return ""
    if abs(between).max() <= rounding:
        return "all groups are equal in every block"
    return "the groups are equally far apart in every block, so the differences between them are exact"
