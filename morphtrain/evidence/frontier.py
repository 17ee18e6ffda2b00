"""Does a method pay? Its accuracy against what the dense network reaches in the same seconds.

A method that trains in 0.7 of the time is no gain if the dense network, given 0.7 of the epochs or made narrower, is as
good. Such dense runs make a curve, accuracy against seconds; what lies above it pays.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from morphtrain.evidence.power import pairs_needed
from morphtrain.evidence.repeats import Estimate, estimate
from morphtrain.wording import counted

PAYS, DOES_NOT_PAY, CANNOT_TELL = "pays", "does not pay", "cannot tell yet"
WIDEST_GAP = 2.5  # between neighbouring dense arms, as a ratio of seconds: a chord far below a curve that levels off
ROUNDING = 1e-9  # of accuracy, far below one image
POWER = 0.8  # with which the seeds asked for would tell
OUTLOOK = (
    f"How many seeds would tell: those of a new experiment, with a probability of {100 * POWER:.0f} %, if effect and "
    "scatter are as they seem."
)


@dataclass(frozen=True)
class Point:
    """A run: how long it trained and how good it became, a share from 0 to 1."""

    seconds: float
    accuracy: float


@dataclass(frozen=True)
class Verdict:
    """Whether a method pays.

    Args:
        verdict: PAYS if the interval of the differences lies above 0 and nothing speaks against the curve there (see
            `doubt`); DOES_NOT_PAY if it lies below the margin; CANNOT_TELL otherwise, too if there is no interval.
        ahead: by how much the method's accuracy is above the curve's in the same seconds, over the seeds; None if there
            is no seed to compare.
        reached: what the dense network reaches in the method's seconds, by the seeds that can be compared.
        margin: what would matter, of accuracy.
        seeds_needed: how many seeds a new experiment of fixed size needs to tell with a power of 0.8, if the difference
            and its scatter are what they seem; None if it can tell, or if nothing can be said about that.
        doubt: why a method that is ahead of the curve cannot be said to pay, and what would tell; "" for others.
        beyond: seeds whose run of the method took longer than every dense run: compared with the best dense arm.
        too_short: seeds whose run was shorter than every dense run: no statement, they are left out.
        unpaired: seeds that only the method or only the dense arms have; left out.
    """

    verdict: str
    ahead: Estimate | None
    reached: Mapping[int, float]
    margin: float
    seeds_needed: int | None
    doubt: str
    beyond: tuple[int, ...]
    too_short: tuple[int, ...]
    unpaired: tuple[int, ...]

    def __str__(self) -> str:
        if self.ahead is None:
            found = "no seed to compare"
        else:
            found = f"accuracy {self.ahead.mean:+.4f}"
            if self.ahead.low is not None and self.ahead.high is not None:
                found += f" [{self.ahead.low:+.4f}, {self.ahead.high:+.4f}]"
            n = counted(self.ahead.n, "seed")
            found += f" against the dense curve at equal seconds ({n}; {self.margin:g} would matter)"
        return f"{self.verdict}: " + "; ".join([found, *self._notes()])

    @property
    def outlook(self) -> str:
        """How many seeds would tell, as `OUTLOOK` explains; "" if that is not known, or not needed."""
        return "" if self.seeds_needed is None else f"{self.seeds_needed} seeds would tell"

    def _notes(self) -> list[str]:
        notes = [note for note in (self.doubt, self.outlook) if note]
        for seeds, what in (
            (self.beyond, "longer than the longest dense run, compared with the best dense arm"),
            (self.too_short, "shorter than the shortest dense run, about which nothing can be said"),
            (self.unpaired, "without a counterpart, left out"),
        ):
            if seeds:
                notes.append(f"seed {', '.join(map(str, seeds))}: {what}")
        return notes


def on_curve(dense: Mapping[int, Mapping[str, Point]]) -> list[str]:
    """The dense arms that make the curve, from fast to slow: those that no faster one equals, by their means.

    They are the same for every seed. The best run of each seed would be the luckiest of several, and a method that is
    as good as the dense network would seem worse.

    Args:
        dense: the dense runs by seed, and by arm. An arm that a seed lacks is left out.

    Raises:
        ValueError: if there is no arm that all seeds have.
    """
    means = means_of_arms(dense)
    if not means:
        raise ValueError("a curve needs a dense arm that every seed has")
    best: list[str] = []
    for arm in sorted(means, key=lambda arm: (means[arm].seconds, -means[arm].accuracy)):
        if not best or means[arm].accuracy > means[best[-1]].accuracy:
            best.append(arm)
    return best


def means_of_arms(dense: Mapping[int, Mapping[str, Point]]) -> dict[str, Point]:
    """The mean run of each arm that every seed has."""
    arms = set.intersection(*map(set, dense.values())) if dense else set()
    return {arm: mean([runs[arm] for runs in dense.values()]) for arm in sorted(arms)}


def mean(runs: Sequence[Point]) -> Point:
    """The means of seconds and of accuracy."""
    return Point(statistics.fmean(run.seconds for run in runs), statistics.fmean(run.accuracy for run in runs))


def read(curve: Sequence[Point], seconds: float) -> float | None:
    """The accuracy of a curve, straight in the logarithm of the seconds; None before its first point.

    After its last point it stays as it is there.
    """
    import numpy as np

    points = sorted(curve, key=lambda point: point.seconds)
    if seconds < points[0].seconds:
        return None
    times, accuracies = [np.log(point.seconds) for point in points], [point.accuracy for point in points]
    return float(np.interp(np.log(seconds), times, accuracies))


def judge(
    method: Mapping[int, Point], dense: Mapping[int, Mapping[str, Point]], margin: float, confidence: float = 0.95
) -> Verdict:
    """Whether a method pays, by its runs and the dense runs of the same seeds.

    Args:
        method: a run by seed.
        dense: the dense runs, full, sooner and narrower, by seed and by arm.
        margin: the least gain of accuracy that would matter, as a share; stated before the runs.

    Raises:
        ValueError: for a margin that is not above 0, or if there is no dense arm that every seed has.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin}: must be above 0")
    common = sorted(method.keys() & dense.keys())
    arms = on_curve(dense) if common else []
    found = {seed: read([dense[seed][arm] for arm in arms], method[seed].seconds) for seed in common}
    reached = {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}
    differences = [method[seed].accuracy - accuracy for seed, accuracy in reached.items()]
    ahead = estimate(differences, confidence) if differences else None
    verdict = _verdict(ahead, margin)
    doubt = _doubt([method[seed] for seed in reached], means_of_arms(dense), arms) if verdict == PAYS else ""
    verdict = CANNOT_TELL if doubt else verdict
    longest = {seed: max(point.seconds for point in dense[seed].values()) for seed in common}
    return Verdict(
        verdict,
        ahead,
        reached,
        margin,
        _seeds_needed(differences, margin, confidence) if verdict == CANNOT_TELL and not doubt else None,
        doubt,
        tuple(seed for seed in common if method[seed].seconds > longest[seed]),
        tuple(seed for seed in common if seed not in reached),
        tuple(sorted(method.keys() ^ dense.keys())),
    )


def _verdict(ahead: Estimate | None, margin: float) -> str:
    if ahead is None or ahead.low is None or ahead.high is None:
        return CANNOT_TELL
    if max(ahead.values) - min(ahead.values) < ROUNDING:  # an interval of no width is no certainty
        return DOES_NOT_PAY if ahead.mean < ROUNDING else CANNOT_TELL
    return PAYS if ahead.low > 0 else DOES_NOT_PAY if ahead.high < margin else CANNOT_TELL


def _doubt(method: Sequence[Point], dense: Mapping[str, Point], curve: Sequence[str]) -> str:
    """Why a method that is ahead of the curve may not be ahead of the dense network, or ""."""
    ours, slowest = mean(method), max(point.seconds for point in dense.values())
    if ours.seconds > slowest:
        return f"no dense run took so long: one of {ours.seconds:.3g} s, more epochs or wider, would tell"
    slower = [dense[arm] for arm in curve if dense[arm].seconds > ours.seconds]
    if not slower or ours.accuracy > slower[0].accuracy:
        return ""
    faster = [dense[arm].seconds for arm in curve if dense[arm].seconds <= ours.seconds]
    if faster and slower[0].seconds / faster[-1] <= WIDEST_GAP:
        return ""
    return f"the dense runs beside it are too far apart: one of some {ours.seconds:.3g} s would tell"


def _seeds_needed(differences: Sequence[float], margin: float, confidence: float) -> int | None:
    """Enough to bring the interval above 0 or below the margin, whichever is further from what was found."""
    if len(differences) < 2 or (deviation := statistics.stdev(differences)) == 0:
        return None
    mean = statistics.fmean(differences)
    return pairs_needed(max(mean, margin - mean), deviation, POWER, 1 - confidence)
