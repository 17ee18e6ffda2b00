"""Two groups of runs: how far they are apart, how sure that is, and whether they are as good as equal.

print(compare_pairs({1: 8.1, 2: 7.9, 3: 8.4}, {1: 10.2, 2: 9.7, 3: 10.1}, RATIO, names=("pruned", "dense")))

The number of runs is chosen before the first (`power.pairs_needed`). Adding runs until a test is significant makes its
p meaningless, so nothing here takes a look at a part of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from morphtrain.evidence.repeats import LEAST_FOR_INTERVAL, estimate
from morphtrain.wording import counted

RATIO, DIFFERENCE = "ratio", "difference"
ROUNDING = 1e-12  # of the largest value: values that differ by less are alike
RESAMPLES = 9999
BOOTSTRAP_SEED = 0  # the same interval for the same runs


@dataclass(frozen=True)
class Comparison:
    """The effect of the first group against the second, with an interval from `low` to `high` and a p.

    Args:
        names: of the two groups.
        scale: RATIO (of geometric means) or DIFFERENCE (of means).
        effect, low, high: on that scale; no interval with fewer than three values.
        n: the number of pairs alone, or the numbers of both groups.
        p: two-sided, of the t test; None where there is no interval or nothing scatters.
        rank_p: two-sided, of Wilcoxon's signed ranks, as a check; None if not paired, or if no result of so few pairs
            could be significant.
        test: its name.
        confidence: of the intervals.
        family: how many comparisons p and rank_p are corrected for (Holm); the intervals are not.
    """

    names: tuple[str, str]
    scale: str
    effect: float
    low: float | None
    high: float | None
    n: tuple[int, ...]
    p: float | None
    rank_p: float | None
    test: str
    confidence: float
    samples: tuple[Any, ...] = field(repr=False, compare=False)  # differences of pairs or both groups, perhaps as logs
    family: int = 1

    @cached_property
    def bootstrap(self) -> tuple[float, float] | None:
        """The interval of BCa (Efron 1987), which supposes no normal distribution.

        None for fewer than three values, or if they are too much alike.
        """
        found = _bca(self.samples, self.confidence) if has_interval(self.samples) else None
        return None if found is None else (unscaled(found[0], self.scale), unscaled(found[1], self.scale))

    @property
    def out_of_reach(self) -> bool:
        """Whether there are so few pairs that a rank test could not find even the clearest effect."""
        return len(self.n) == 1 and self.n[0] < least_pairs(self.confidence)

    @property
    def significant(self) -> bool:
        """Whether p is small enough, and the number of pairs large enough."""
        return self.p is not None and not self.out_of_reach and self.p < 1 - self.confidence

    def __str__(self) -> str:
        what = " / " if self.scale == RATIO else " - "
        count = counted(self.n[0], "pair") if len(self.n) == 1 else f"{self.n[0]} and {self.n[1]} runs"
        return f"{what.join(self.names)}: {self.effect:.4g} {self._interval()} ({count}), {self._said()}"

    def _interval(self) -> str:
        if self.low is None or self.high is None:
            return "without an interval"
        bootstrap = "" if self.bootstrap is None else "; BCa [{:.4g}, {:.4g}]".format(*self.bootstrap)
        return f"[{self.low:.4g}, {self.high:.4g}]{bootstrap}"

    def _said(self) -> str:
        if self.out_of_reach:
            return f"significance out of reach: {least_pairs(self.confidence)} pairs or more could show it"
        if self.p is None:
            return "no test: " + ("nothing scatters" if self.low is not None else "too few runs")
        rank = "" if self.rank_p is None else f", Wilcoxon p = {self.rank_p:.2g}"
        family = "" if self.family == 1 else f", corrected for {self.family} comparisons (Holm)"
        return f"{self.test} p = {self.p:.2g}{rank}{family}"


def least_pairs(confidence: float = 0.95) -> int:
    """The fewest pairs with which a rank test can be significant: all of one sign has p = 2 / 2^n. Six at 95 %."""
    return math.floor(1 - math.log2(1 - confidence)) + 1


def compare_pairs(
    ours: Mapping[Any, float],
    theirs: Mapping[Any, float],
    scale: str,
    *,
    names: tuple[str, str],
    confidence: float = 0.95,
) -> Comparison:
    """Compare values that are paired, by seed for instance; only what both have counts.

    On a ratio's scale this is the paired t test of log ratios: what slows both runs of a pair by the same factor has no
    influence.

    Raises:
        ValueError: without a pair, for numbers that are not finite, or on a ratio's scale not above 0.
    """
    differences = paired(ours, theirs, scale)
    n = len(differences)
    from scipy import stats

    p = rank_p = None
    if has_interval((differences,)) and scatters((differences,)):
        p = float(stats.ttest_1samp(differences, 0).pvalue)
        rank_p = float(stats.wilcoxon(differences).pvalue) if n >= least_pairs(confidence) else None
    return _comparison((differences,), scale, names, confidence, p, rank_p)


def compare_groups(
    ours: Sequence[float],
    theirs: Sequence[float],
    scale: str,
    *,
    names: tuple[str, str],
    confidence: float = 0.95,
) -> Comparison:
    """Compare two independent groups, by Welch's t test, on a ratio's scale that of the logarithms.

    Raises:
        ValueError: for an empty group, numbers that are not finite, or on a ratio's scale not above 0.
    """
    samples = scaled(ours, scale), scaled(theirs, scale)
    from scipy import stats

    p = None
    if has_interval(samples) and scatters(samples):
        p = float(stats.ttest_ind(*samples, equal_var=False).pvalue)
    return _comparison(samples, scale, names, confidence, p, None)


def are_equal(ours: Any, theirs: Any) -> bool:
    """Whether there is nothing to test: two groups of one and the same value, or pairs without a difference."""
    if isinstance(ours, Mapping):
        return all(ours[key] == theirs[key] for key in ours.keys() & theirs.keys())
    return len({*ours, *theirs}) == 1


def _comparison(
    samples: tuple[Any, ...],
    scale: str,
    names: tuple[str, str],
    confidence: float,
    p: float | None,
    rank_p: float | None,
) -> Comparison:
    """`samples`: the differences of pairs, or both groups; logarithms on a ratio's scale."""
    low, high = t_interval(samples, confidence) if has_interval(samples) else (None, None)
    effect, low, high = (
        None if value is None else unscaled(value, scale) for value in (effect_of(*samples), low, high)
    )
    assert effect is not None
    test = ("paired t test" if len(samples) == 1 else "Welch's t test") + (" of logs" if scale == RATIO else "")
    n = tuple(map(len, samples))
    return Comparison(names, scale, effect, low, high, n, p, rank_p, test, confidence, samples)


def effect_of(*samples: Any, axis: int = -1) -> Any:
    """The mean of differences, or the difference of two means."""
    means = [sample.mean(axis=axis) for sample in samples]
    return means[0] if len(means) == 1 else means[0] - means[1]


def t_interval(samples: tuple[Any, ...], confidence: float) -> tuple[float, float]:
    """The interval of the effect of these samples, by Student's or Welch's t."""
    if len(samples) == 1:
        found = estimate(samples[0].tolist(), confidence)
        assert found.low is not None and found.high is not None
        return found.low, found.high
    if not scatters(samples):
        return float(effect_of(*samples)), float(effect_of(*samples))
    from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

    low, high = CompareMeans(*map(DescrStatsW, samples)).tconfint_diff(1 - confidence, usevar="unequal")
    return float(low), float(high)


def _bca(samples: tuple[Any, ...], confidence: float) -> tuple[float, float] | None:
    import warnings

    import numpy as np
    from scipy import stats

    if not scatters(samples):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the ends are NaN then
        found = stats.bootstrap(
            samples,
            effect_of,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=confidence,
            method="BCa",
            rng=np.random.default_rng(BOOTSTRAP_SEED),
        ).confidence_interval
    return None if np.isnan(found).any() else (float(found.low), float(found.high))


def scatters(samples: tuple[Any, ...]) -> bool:
    """Whether a group's values differ by more than rounding errors."""
    return any(sample.max() - sample.min() > ROUNDING * abs(sample).max() for sample in samples)


def has_interval(samples: tuple[Any, ...]) -> bool:
    """Whether every group has enough values for an interval."""
    return all(len(sample) >= LEAST_FOR_INTERVAL for sample in samples)


def paired(ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], scale: str) -> Any:
    """Ours less theirs, of what both have; of logarithms on a ratio's scale."""
    keys = [key for key in ours if key in theirs]
    return scaled([ours[key] for key in keys], scale) - scaled([theirs[key] for key in keys], scale)


def scaled(values: Sequence[float], scale: str) -> Any:
    """Checked values as an array, logarithms on a ratio's scale."""
    import numpy as np

    if scale not in (RATIO, DIFFERENCE):
        raise ValueError(f"scale={scale!r}: {RATIO} or {DIFFERENCE} works")
    array = np.asarray(values, float)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"values={list(values)}: must be one or more finite numbers")
    if scale == RATIO and not (array > 0).all():
        raise ValueError(f"values={list(values)}: a ratio needs numbers above 0")
    return np.log(array) if scale == RATIO else array


def unscaled(value: float, scale: str) -> float:
    """A number as it is shown, from one of `scaled` values."""
    return math.exp(value) if scale == RATIO else float(value)
