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

PAYS, DOES_NOT_PAY, CANNOT_TELL = "pays", "does not pay", "cannot tell yet"
POWER = 0.8  # with which the seeds asked for would tell


@dataclass(frozen=True)
class Point:
    """A run: how long it trained and how good it became, a share from 0 to 1."""

    seconds: float
    accuracy: float


@dataclass(frozen=True)
class Verdict:
    """Whether a method pays.

    Args:
        verdict: PAYS if the interval of the differences lies above 0; DOES_NOT_PAY if it lies below the margin;
            CANNOT_TELL otherwise, too if there is no interval.
        ahead: by how much the method's accuracy is above the curve's in the same seconds, over the seeds; None if there
            is no seed to compare.
        margin: what would matter, of accuracy.
        seeds_needed: how many seeds a new experiment of fixed size needs to tell with a power of 0.8, if the difference
            and its scatter are what they seem; None if it can tell, or if nothing can be said about that.
        beyond: seeds whose run of the method took longer than every dense run: compared with the best dense one.
        too_short: seeds whose run was shorter than every dense run: no statement, they are left out.
        unpaired: seeds that only the method or only the dense arms have; left out.
    """

    verdict: str
    ahead: Estimate | None
    margin: float
    seeds_needed: int | None
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
            found += f" against the dense curve at equal seconds ({self.ahead.n} seeds; {self.margin:g} would matter)"
        return f"{self.verdict}: " + "; ".join([found, *self._notes()])

    def _notes(self) -> list[str]:
        notes = [f"{self.seeds_needed} seeds in a new experiment would tell"] if self.seeds_needed else []
        for seeds, what in (
            (self.beyond, "longer than the longest dense run, compared with the best dense one"),
            (self.too_short, "shorter than the shortest dense run, about which nothing can be said"),
            (self.unpaired, "without a counterpart, left out"),
        ):
            if seeds:
                notes.append(f"seed {', '.join(map(str, seeds))}: {what}")
        return notes


def dense_accuracy(curve: Sequence[Point], seconds: float) -> float | None:
    """The accuracy that the dense network reaches in some seconds; None if it was never run so short.

    The curve goes through the runs that no shorter run equals (the upper envelope, which rises), straight in the
    logarithm of the seconds, and stays at the best accuracy after the last of them.

    Args:
        curve: the dense runs of one seed, in any order.

    Raises:
        ValueError: without a run.
    """
    if not curve:
        raise ValueError("a curve needs one or more runs")
    if seconds < min(point.seconds for point in curve):
        return None
    best: list[Point] = []
    for point in sorted(curve, key=lambda point: (point.seconds, -point.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    import numpy as np

    times, accuracies = [np.log(point.seconds) for point in best], [point.accuracy for point in best]
    return float(np.interp(np.log(seconds), times, accuracies))


def judge(
    method: Mapping[int, Point], dense: Mapping[int, Sequence[Point]], margin: float, confidence: float = 0.95
) -> Verdict:
    """Whether a method pays, by its runs and the dense runs of the same seeds.

    Args:
        method: a run by seed.
        dense: the dense runs, full, sooner and narrower, by seed.
        margin: the least gain of accuracy that would matter, as a share; stated before the runs.

    Raises:
        ValueError: for a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin}: must be above 0")
    common = sorted(seed for seed in method if dense.get(seed))
    reached = {seed: dense_accuracy(dense[seed], method[seed].seconds) for seed in common}
    differences = [method[seed].accuracy - found for seed, found in reached.items() if found is not None]
    ahead = estimate(differences, confidence) if differences else None
    verdict = _verdict(ahead, margin)
    longest = {seed: max(point.seconds for point in dense[seed]) for seed in common}
    return Verdict(
        verdict,
        ahead,
        margin,
        _seeds_needed(differences, margin, confidence) if verdict == CANNOT_TELL else None,
        tuple(seed for seed in common if method[seed].seconds > longest[seed]),
        tuple(seed for seed, found in reached.items() if found is None),
        tuple(sorted((method.keys() | {seed for seed in dense if dense[seed]}) - set(common))),
    )


def _verdict(ahead: Estimate | None, margin: float) -> str:
    if ahead is None or ahead.low is None or ahead.high is None:
        return CANNOT_TELL
    return PAYS if ahead.low > 0 else DOES_NOT_PAY if ahead.high < margin else CANNOT_TELL


def _seeds_needed(differences: Sequence[float], margin: float, confidence: float) -> int | None:
    """Enough to bring the interval above 0 or below the margin, whichever is further from what was found."""
    if len(differences) < 2 or (deviation := statistics.stdev(differences)) == 0:
        return None
    mean = statistics.fmean(differences)
    return pairs_needed(max(mean, margin - mean), deviation, POWER, 1 - confidence)
