"""What does a method save? Its seconds against those of the dense network that is as accurate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from morphtrain.evidence.frontier import Point, mean, means_of_arms, on_curve
from morphtrain.evidence.repeats import Estimate, estimate, geometric


@dataclass(frozen=True)
class Savings:
    """A method beside the dense network that is as accurate.

    That lies on the curve between two neighbouring arms, at the method's mean accuracy. A method that is more accurate
    than all of the curve is held against its best arm, one that is less accurate against its fastest.

    Args:
        arms: the two neighbours, the faster first, or the arm alone.
        seconds: the method's as a share of the dense network's; the geometric mean over the seeds.
        accuracy: the method's less the dense network's. Between two neighbours it is 0 on average, with an interval
            that says how well it is known that they are equal.
        ours, theirs: the accuracies by seed.
    """

    arms: tuple[str, ...]
    seconds: Estimate
    accuracy: Estimate
    ours: Mapping[int, float]
    theirs: Mapping[int, float]


def savings(method: Mapping[int, Point], dense: Mapping[int, Mapping[str, Point]], confidence: float = 0.95) -> Savings:
    """What a method's accuracy costs the dense network, over the seeds that both have.

    Which arms, and how far between them, is decided by the means over the seeds, as the curve's arms are. The interval
    of the seconds is for that place on the curve.

    Args:
        method: a run by seed.
        dense: the dense runs, full, sooner and narrower, by seed and by arm.

    Raises:
        ValueError: if they have no seed in common, or these no dense arm that every seed has.
    """
    common = sorted(method.keys() & dense.keys())
    dense = {seed: dense[seed] for seed in common}
    arms, means = on_curve(dense), means_of_arms(dense)
    wanted = mean([method[seed] for seed in common]).accuracy
    index = sum(means[arm].accuracy < wanted for arm in arms)  # of the first arm that is as accurate
    faster, slower = arms[max(index - 1, 0)], arms[min(index, len(arms) - 1)]
    gap = means[slower].accuracy - means[faster].accuracy
    share = (wanted - means[faster].accuracy) / gap if gap > 0 else 0.0
    points = {seed: _between(runs[faster], runs[slower], share) for seed, runs in dense.items()}
    return Savings(
        tuple(dict.fromkeys((faster, slower))),
        geometric([method[seed].seconds / points[seed].seconds for seed in common], confidence),
        estimate([method[seed].accuracy - points[seed].accuracy for seed in common], confidence),
        {seed: method[seed].accuracy for seed in common},
        {seed: points[seed].accuracy for seed in common},
    )


def _between(faster: Point, slower: Point, share: float) -> Point:
    """A place on the curve, straight in the logarithm of the seconds."""
    seconds = faster.seconds ** (1 - share) * slower.seconds**share
    return Point(seconds, (1 - share) * faster.accuracy + share * slower.accuracy)
