"""Few runs on many tasks as one number with an interval (rliable: Agarwal et al. 2021, "Deep RL at the statistical
precipice"): the mean of the middle half, and the probability that one method beats another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 9999
SEED = 0  # of the bootstrap: the same interval for the same runs


@dataclass(frozen=True)
class Aggregate:
    """A number with its percentile interval, from resampling the runs within each task (stratified bootstrap)."""

    name: str
    effect: float
    low: float
    high: float
    tasks: int
    n: int  # runs
    confidence: float

    def __str__(self) -> str:
        tasks = f"{self.tasks} task{'s' * (self.tasks > 1)}"
        return f"{self.name}: {self.effect:.4g} [{self.low:.4g}, {self.high:.4g}] ({self.n} runs, {tasks})"


def interquartile_mean(tasks: Sequence[Sequence[float]], confidence: float = 0.95) -> Aggregate:
    """The mean of the middle half of all runs: less moved by one odd run than a mean, steadier than a median.

    Args:
        tasks: the values of the runs of each task, on a common scale; two runs or more each.

    Raises:
        ValueError: for a task with fewer than two runs, or a number that is not finite.
    """
    return _bootstrapped("interquartile mean", _middle, _arrays(tasks), len(tasks), confidence)


def probability_of_improvement(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], confidence: float = 0.95
) -> Aggregate:
    """How often a run of ours has a higher value than one of theirs on the same task; ties count half.

    Args:
        ours, theirs: the values of each task's runs, of the same tasks in the same order; two runs or more each.

    Raises:
        ValueError: as `interquartile_mean`, or for unequal numbers of tasks.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} tasks and {len(theirs)}: must be the same")
    samples = _arrays([*ours, *theirs])
    return _bootstrapped("probability of improvement", _beaten, samples, len(ours), confidence)


def _middle(*samples: Any, axis: int = -1) -> Any:
    import numpy as np
    from scipy import stats

    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def _beaten(*samples: Any, axis: int = -1) -> Any:
    """Mann and Whitney's U over the number of pairs, which is its share, averaged over tasks; `axis` is the last."""
    half = len(samples) // 2
    shares = []
    for ours, theirs in zip(samples[:half], samples[half:], strict=True):
        a, b = ours[..., :, None], theirs[..., None, :]
        shares.append(((a > b) + 0.5 * (a == b)).mean(axis=(-2, -1)))
    return sum(shares) / half


def _bootstrapped(
    name: str, statistic: Callable[..., Any], samples: list[Any], tasks: int, confidence: float
) -> Aggregate:
    import numpy as np
    from scipy import stats

    ends = stats.bootstrap(
        samples,
        statistic,
        vectorized=True,
        batch=1000,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    n = sum(map(len, samples))
    return Aggregate(name, float(statistic(*samples)), float(ends.low), float(ends.high), tasks, n, confidence)


def _arrays(tasks: Sequence[Sequence[float]]) -> list[Any]:
    import numpy as np

    arrays = [np.asarray(runs, float) for runs in tasks]
    if not arrays or any(len(runs) < 2 or not np.isfinite(runs).all() for runs in arrays):
        raise ValueError(f"{[list(runs) for runs in tasks]}: must be tasks of two or more finite numbers each")
    return arrays
