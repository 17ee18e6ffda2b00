"""Whether two groups of runs are as good as equal: within a margin that was stated before the first of them.

print(pairs_within({1: 0.91, 2: 0.92, 3: 0.9}, {1: 0.91, 2: 0.9, 3: 0.92}, DIFFERENCE, below=0.02, names=("a", "b")))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from morphtrain.evidence.comparisons import (
    RATIO,
    effect_of,
    has_interval,
    paired,
    scaled,
    scatters,
    t_interval,
    unscaled,
)


@dataclass(frozen=True)
class WithinMargin:
    """Whether an effect lies within a margin that was stated before, from `lowest` to `highest` on its scale.

    A bound that does not matter is infinite (on a ratio's lower side 0): then it is a test of non-inferiority,
    otherwise of equivalence (two one-sided tests, Schuirmann 1987). Either is shown if p < 0.05, which is if the
    interval of 90 % lies within the bounds. What is not shown is not refuted.
    """

    names: tuple[str, str]
    scale: str
    effect: float
    low: float
    high: float
    lowest: float
    highest: float
    n: tuple[int, ...]
    p: float
    level: float

    @property
    def shown(self) -> bool:
        """Whether the effect is shown to lie within the margin."""
        return self.p < self.level

    def __str__(self) -> str:
        what = " / " if self.scale == RATIO else " - "
        one_sided = math.isinf(self.highest) or math.isinf(self.lowest) or self.lowest == 0
        claim = f"{'is' if self.shown else 'is not shown to be'} {'no worse' if one_sided else 'equivalent'}"
        bounds = f"within {self.lowest:.4g} to {self.highest:.4g}"
        if one_sided:
            has_floor = math.isinf(self.highest)
            bounds = f"(not {'below' if has_floor else 'above'} {self.lowest if has_floor else self.highest:.4g})"
        return (
            f"{what.join(self.names)}: {claim} {bounds}: {self.effect:.4g} "
            f"[{self.low:.4g}, {self.high:.4g}] ({1 - 2 * self.level:.0%}; n = {' and '.join(map(str, self.n))}), "
            f"p = {self.p:.2g}"
        )


def pairs_within(
    ours: Mapping[Any, float],
    theirs: Mapping[Any, float],
    scale: str,
    *,
    below: float | None = None,
    above: float | None = None,
    names: tuple[str, str],
    level: float = 0.05,
) -> WithinMargin:
    """Test whether paired values differ by less than a margin.

    Args:
        below, above: how far ours may be below and above theirs: a difference, or on a ratio's scale 0.1 for 1 / 1.1
            and 1.1; None: any distance. Both are a test of equivalence, one alone of non-inferiority.
        level: of the test.

    Raises:
        ValueError: as `compare_pairs`, without a margin above 0, or for fewer than three pairs or pairs all alike.
    """
    return _within((paired(ours, theirs, scale),), scale, below, above, names, level)


def groups_within(
    ours: Sequence[float],
    theirs: Sequence[float],
    scale: str,
    *,
    below: float | None = None,
    above: float | None = None,
    names: tuple[str, str],
    level: float = 0.05,
) -> WithinMargin:
    """The same as `pairs_within` for independent groups, by Welch's test."""
    return _within((scaled(ours, scale), scaled(theirs, scale)), scale, below, above, names, level)


def _within(
    samples: tuple[Any, ...],
    scale: str,
    below: float | None,
    above: float | None,
    names: tuple[str, str],
    level: float,
) -> WithinMargin:
    margins = [margin for margin in (below, above) if margin is not None]
    if not margins or not all(margin > 0 for margin in margins):
        raise ValueError(f"below={below}, above={above}: one or both must be given, above 0")
    if not has_interval(samples) or not scatters(samples):
        raise ValueError(f"n={[*map(len, samples)]}: a margin needs three values or more that are not all alike")
    reach = math.log1p if scale == RATIO else float
    lowest, highest = -math.inf if below is None else -reach(below), math.inf if above is None else reach(above)
    from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

    sides = [(end, side) for end, side in ((lowest, "larger"), (highest, "smaller")) if math.isfinite(end)]
    if len(samples) == 1:
        tests = [DescrStatsW(samples[0]).ttest_mean(end, side) for end, side in sides]
    else:
        means = CompareMeans(*map(DescrStatsW, samples))
        tests = [means.ttest_ind(side, "unequal", end) for end, side in sides]
    p = max(float(test[1]) for test in tests)
    low, high = t_interval(samples, 1 - 2 * level)
    effect, low, high, lowest, highest = (
        unscaled(end, scale) for end in (effect_of(*samples), low, high, lowest, highest)
    )
    return WithinMargin(names, scale, effect, low, high, lowest, highest, tuple(map(len, samples)), p, level)
