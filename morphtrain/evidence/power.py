"""How many runs an experiment needs before it starts, and what it can find with those that it has."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

from morphtrain.evidence.comparisons import least_pairs

MOST = 1_000_000  # runs; an experiment that needs more is none
SURE = 30.0  # an effect of so many standard errors is always found; the noncentral t loses its digits there


def power_of_pairs(effect: float, deviation: float, pairs: int, level: float = 0.05) -> float:
    """The probability that a paired, two-sided t test finds an effect.

    Args:
        effect: the true mean of the differences; for a ratio its logarithm, as `math.log(0.95)`.
        deviation: standard deviation of the differences between pairs; for a ratio of the log ratios.
        level: of the test.

    Raises:
        ValueError: for a deviation that is not above 0 or fewer than two pairs.
    """
    _check(deviation, pairs)
    size = abs(effect) / deviation
    if size * math.sqrt(pairs) > SURE:
        return 1.0
    from statsmodels.stats.power import TTestPower

    return float(TTestPower().power(size, pairs, level))


def power_of_groups(effect: float, deviation: float, runs: int, level: float = 0.05) -> float:
    """The same for two independent groups of `runs` runs each, each with this deviation."""
    _check(deviation, runs)
    size = abs(effect) / deviation
    if size * math.sqrt(runs / 2) > SURE:
        return 1.0
    from statsmodels.stats.power import TTestIndPower

    return float(TTestIndPower().power(size, runs, level))


def pairs_needed(effect: float, deviation: float, power: float = 0.8, level: float = 0.05) -> int | None:
    """The number of pairs with which a paired t test finds this effect with this probability; None: over a million.

    It is the size of a new experiment, all of whose pairs are run before it is looked at. It does not say how many
    pairs to add to the ones at hand: a test repeated as runs are added is significant too often. Never fewer than a
    rank test needs to confirm it.
    """
    return _smallest(partial(power_of_pairs, effect, deviation, level=level), power, least_pairs(1 - level))


def runs_needed(effect: float, deviation: float, power: float = 0.8, level: float = 0.05) -> int | None:
    """The same for two independent groups: the number of runs in each."""
    return _smallest(partial(power_of_groups, effect, deviation, level=level), power, 3)


def _smallest(power_of: Callable[[int], float], wanted: float, least: int) -> int | None:
    if not 0 < wanted < 1:
        raise ValueError(f"power={wanted}: must be between 0 and 1")
    found = bisect_left(range(MOST + 1), True, least, key=lambda n: power_of(n) >= wanted)
    return None if found > MOST else found


def _check(deviation: float, runs: int) -> None:
    if not (deviation > 0 and math.isfinite(deviation)):
        raise ValueError(f"deviation={deviation}: must be finite and above 0")
    if runs < 2:
        raise ValueError(f"{runs} runs: a test needs two or more")
