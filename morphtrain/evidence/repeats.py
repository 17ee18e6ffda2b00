"""What repeats of a run with other seeds tell: a mean, and how far it can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEAST_FOR_INTERVAL = 3  # with two values the t interval is some 13 times as wide as they are apart


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its confidence interval from `low` to `high`, None for fewer than three values.

    `values` are the values themselves, in the order in which they were given.
    """

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    @property
    def n(self) -> int:
        """Number of values."""
        return len(self.values)

    def __str__(self) -> str:
        if len(set(self.values)) == 1:
            return f"{self.mean:.4g}"
        if self.low is not None and self.high is not None:
            return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.mean:.4g} ({min(self.values):.4g} to {max(self.values):.4g})"


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of independent values, with Student's t interval if there are three or more.

    Raises:
        ValueError: if there are no values, or one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values={list(values)}: must be one or more finite numbers")
    mean = statistics.fmean(values)
    if len(values) < LEAST_FOR_INTERVAL:
        return Estimate(tuple(values), mean, None, None)
    from scipy import stats

    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Estimate(tuple(values), mean, mean - reach, mean + reach)


def geometric(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The geometric mean of positive values, as times are; its interval, that of the mean logarithm, is above 0.

    Raises:
        ValueError: as `estimate`, or if a value is not above 0.
    """
    if not all(value > 0 for value in values):
        raise ValueError(f"values={list(values)}: a geometric mean needs numbers above 0")
    logs = estimate([math.log(value) for value in values], confidence)
    ends = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Estimate(tuple(values), math.exp(logs.mean), *ends)


def share(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of values from 0 to 1, as accuracies are; its interval ends there, too."""
    found = estimate(values, confidence)
    low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (found.low, found.high))
    return Estimate(found.values, found.mean, low, high)


def paired_ratio(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Estimate | None:
    """The geometric mean of value / baseline over the seeds that both have; None if there is none.

    The interval is that of the mean logarithm, so that a ratio and its inverse are treated alike.

    Args:
        values, baseline: positive numbers, such as times, by seed.
    """
    ratios = [values[seed] / baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    return geometric(ratios, confidence) if ratios else None
