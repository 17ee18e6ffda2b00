"""What the best of a search saves against the best baseline, by runs with seeds that the search never saw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from morphtrain.evidence import words
from morphtrain.evidence.power import pairs_needed
from morphtrain.evidence.repeats import Estimate, geometric, paired_ratio
from morphtrain.wording import counted

SAVES, SAVES_NOTHING, CANNOT_TELL = "saves", "saves nothing", "cannot tell yet"
WORTH = 0.05  # a saving below this share is none
POWER = 0.8  # with which the seeds asked for would tell

Times = Mapping[str, Mapping[int, float]]  # by arm and seed; a run that missed what it had to reach has none


@dataclass(frozen=True)
class Winner:
    """The best of a search beside the best baseline.

    Args:
        verdict: SAVES if the interval of the ratio lies below 1 and the winner reaches what it has to with as many
            seeds as the baseline; SAVES_NOTHING if less than 5 % can be saved, or no candidate has reached it at all;
            CANNOT_TELL otherwise.
        arm: of the candidates, the one with the least `expected` value; None if none has reached it.
        baseline: the same of the baselines.
        ratio: the winner's values to the baseline's, paired by seed. The winner is chosen by the same runs, so its
            interval is as wide as those of all candidates have to be to hold at once (Bonferroni).
        reached: with how many of the seeds each arm has reached what it had to.
        seeds: how many there are.
        candidates: how many the winner was chosen from.
        seeds_needed: how many seeds a new set of runs needs to tell with a power of 0.8, if the ratio and its scatter
            are what they seem; None if it can tell, or if nothing can be said about that.
    """

    verdict: str
    arm: str | None
    baseline: str | None
    ratio: Estimate | None
    reached: Mapping[str, int]
    seeds: int
    candidates: int
    seeds_needed: int | None

    def __str__(self) -> str:
        if self.arm is None:
            return f"{self.verdict}: none of {counted(self.candidates, 'trial')} reached the target again"
        if self.baseline is None:
            return f"{self.verdict}: no baseline reached the target again, so there is nothing to compare with"
        counts = [f"{arm} with {self.reached[arm]} of {self.seeds} seeds" for arm in (self.arm, self.baseline)]
        if self.ratio is None:
            return f"{self.verdict}: {words.listed(counts)} reached the target, and none of these is the same"
        parts = [f"{self._verdict()}: {self.arm} takes {self._took()}"]
        if any(self.reached[arm] < self.seeds for arm in (self.arm, self.baseline)):
            parts.append(f"the target was reached by {words.listed(counts)}")
        if self.seeds_needed is not None:
            parts.append(f"{self.seeds_needed} seeds would tell, with a probability of {100 * POWER:.0f} %")
        return "; ".join(parts)

    def _verdict(self) -> str:
        assert self.ratio is not None
        return f"{self.verdict} {100 * (1 - self.ratio.mean):.0f} %" if self.verdict == SAVES else self.verdict

    def _took(self) -> str:
        """`0.62 [0.55, 0.70] of the best baseline's, sooner`."""
        assert self.ratio is not None
        ratio = words.interval(self.ratio.mean, self.ratio.low, self.ratio.high)
        chosen = f", with 95 % for all {self.candidates} that it was chosen from" if self.candidates > 1 else ""
        return f"{ratio} of what the best baseline takes, {self.baseline} ({counted(self.ratio.n, 'seed')}{chosen})"


def expected(values: Mapping[int, float], seeds: int) -> float:
    """What it takes on average until a run reaches its target, if one that misses it has taken as long; inf if none."""
    return geometric(list(values.values())).mean * seeds / len(values) if values else math.inf


def judge(
    times: Times, candidates: Sequence[str], baselines: Sequence[str], seeds: int, confidence: float = 0.95
) -> Winner:
    """Whether the best of the candidates saves anything against the best of the baselines.

    Args:
        times: values above 0 of all these arms, of which less is better.
        seeds: with how many each has run.
    """
    level = (1 - confidence) / max(1, len(candidates))
    arm, baseline = _best(times, candidates, seeds), _best(times, baselines, seeds)
    reached = {name: len(times[name]) for name in (*baselines, *candidates)}
    ratio = paired_ratio(times[arm], times[baseline], 1 - level) if arm and baseline else None
    verdict = CANNOT_TELL if arm else SAVES_NOTHING
    if arm and baseline and ratio is not None and ratio.low is not None and ratio.high is not None:
        as_often = reached[arm] >= reached[baseline]
        verdict = SAVES if ratio.high < 1 and as_often else SAVES_NOTHING if ratio.low > 1 - WORTH else CANNOT_TELL
    needed = _seeds_needed(ratio, level) if verdict == CANNOT_TELL and ratio is not None else None
    return Winner(verdict, arm, baseline, ratio, reached, seeds, len(candidates), needed)


def _best(times: Times, arms: Sequence[str], seeds: int) -> str | None:
    found = min(arms, key=lambda arm: expected(times[arm], seeds), default=None)
    return found if found is not None and times[found] else None


def _seeds_needed(ratio: Estimate, level: float) -> int | None:
    """Enough to bring the interval below 1 or above what is worth it, whichever is further from what was found."""
    logs = [math.log(value) for value in ratio.values]
    if len(logs) < 2 or (ratio.high is not None and ratio.high < 1) or (deviation := statistics.stdev(logs)) == 0:
        return None
    mean = statistics.fmean(logs)
    return pairs_needed(max(-mean, mean - math.log(1 - WORTH)), deviation, POWER, level)
