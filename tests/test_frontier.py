"""Does a method pay? Against curves of dense runs whose values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morphtrain.evidence.frontier import CANNOT_TELL, DOES_NOT_PAY, PAYS, Point, judge, on_curve, read
from morphtrain.evidence.power import power_of_pairs

RUNS = st.lists(st.builds(Point, st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=8)
SECONDS = st.floats(0.5, 200)


def curve(runs: list[Point]) -> list[Point]:
    """Of dense arms that each have one run."""
    arms = {str(number): run for number, run in enumerate(runs)}
    return [arms[arm] for arm in on_curve({1: arms})]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(runs=RUNS, seconds=SECONDS, more=st.floats(1, 2))
def test_the_curve_rises_and_is_never_below_a_run(runs: list[Point], seconds: float, more: float) -> None:
    found = read(curve(runs), seconds)
    in_time = [point.accuracy for point in runs if point.seconds <= seconds]
    assert (found is None) == (not in_time)
    if found is not None:
        assert max(in_time) - 1e-9 <= found <= max(point.accuracy for point in runs) + 1e-9
        later = read(curve(runs), seconds * more)
        assert later is not None and later >= found - 1e-9


def test_the_curve_is_straight_in_the_logarithm_of_seconds_and_passes_over_a_bad_run() -> None:
    runs = [Point(40, 0.9), Point(10, 0.8), Point(20, 0.3)]
    assert read(curve(runs), 20) == pytest.approx(0.85)
    assert read(curve(runs), 10 * math.sqrt(2)) == pytest.approx(0.825)
    assert read(curve([*runs, Point(80, 0.7)]), 80) == 0.9
    assert read(curve(runs), 9.9) is None


def test_the_arms_of_the_curve_are_chosen_by_their_means() -> None:
    dense = {
        1: {"full": Point(40, 0.90), "half": Point(20, 0.92), "narrow": Point(22, 0.80)},
        2: {"full": Point(44, 0.94), "half": Point(22, 0.88), "narrow": Point(18, 0.89), "only here": Point(5, 0.99)},
    }
    assert on_curve(dense) == ["narrow", "half", "full"]
    with pytest.raises(ValueError, match="every seed"):
        on_curve({1: {"full": Point(1, 1)}, 2: {"half": Point(1, 1)}})


def test_a_method_that_is_as_good_as_the_dense_arms_is_not_held_against_the_luckiest_of_them() -> None:
    """Five dense arms and a method, all 0.95 +- 0.01 of accuracy whatever their seconds."""
    rng = np.random.default_rng(0)
    gains, pays = [], 0
    for _ in range(400):
        accuracy = 0.95 + 0.01 * rng.standard_normal((6, 10))
        seconds = [5.0, 10.0, 15.0, 20.0, 40.0]
        dense = {s: {str(t): Point(t, accuracy[arm, s]) for arm, t in enumerate(seconds)} for s in range(10)}
        verdict = judge({s: Point(20, accuracy[5, s]) for s in range(10)}, dense, 0.01)
        assert verdict.ahead is not None
        gains.append(verdict.ahead.mean)
        pays += verdict.verdict == PAYS
    assert abs(np.mean(gains)) < 0.004, "the luckiest run of the four that are no slower is 0.0103 above the mean"
    assert pays / 400 < 0.04


def judged(gains: list[float], margin: float = 0.01):
    """A method that is ahead by these gains, a seed each, of dense runs that differ much from seed to seed."""
    curve = {"quarter": (10, 0.5), "half": (20, 0.55), "full": (40, 0.6)}
    dense = {s: {arm: Point(t, a + s / 20) for arm, (t, a) in curve.items()} for s in range(len(gains))}
    return judge({s: Point(20, 0.55 + s / 20 + gain) for s, gain in enumerate(gains)}, dense, margin)


def test_a_verdict_follows_the_interval_of_paired_differences() -> None:
    assert judged([0.02, 0.021, 0.019]).verdict == PAYS
    assert judged([-0.02, -0.021, -0.019]).verdict == DOES_NOT_PAY
    assert judged([0.001, 0.002, -0.001, 0.0]).verdict == DOES_NOT_PAY, "the interval ends below what would matter"
    unsure = judged([0.02, -0.01, 0.03])
    assert unsure.verdict == CANNOT_TELL and unsure.ahead is not None
    assert unsure.ahead.mean == pytest.approx(0.04 / 3)
    assert judged([0.02, 0.02]).verdict == CANNOT_TELL, "two seeds have no interval"


def test_the_seeds_asked_for_would_tell() -> None:
    for gains, distance in (([0.02, -0.01, 0.03], 0.04 / 3), ([0.012, -0.01, 0.001], 0.009)):
        n = judged(gains).seeds_needed
        deviation = float(np.std(gains, ddof=1))
        assert n is not None
        assert power_of_pairs(distance, deviation, n) >= 0.8 > power_of_pairs(distance, deviation, n - 1)
        assert f"cannot tell yet: accuracy {np.mean(gains):+.4f}" in str(judged(gains))
        assert f"; {n} seeds would tell" in str(judged(gains))


def test_what_lies_outside_of_the_curve() -> None:
    dense = {s: {"sooner": Point(10, 0.8), "full": Point(40, 0.9)} for s in range(5)}
    long = judge({s: Point(80, 0.95 + s / 1000) for s in range(4)}, dense, 0.01)
    assert long.verdict == CANNOT_TELL and long.beyond == (0, 1, 2, 3) and long.unpaired == (4,)
    assert long.ahead is not None and long.ahead.mean == pytest.approx(0.0515), "against the best dense arm"
    assert "no dense run took so long" in str(long) and long.seeds_needed is None, "more seeds would not tell"
    worse = judge({s: Point(80, 0.85 + s / 1000) for s in range(4)}, dense, 0.01)
    assert worse.verdict == DOES_NOT_PAY, "slower and less accurate"
    short = judge({s: Point(5, 0.95) for s in range(4)}, dense, 0.01)
    assert short.verdict == CANNOT_TELL and short.ahead is None and short.too_short == (0, 1, 2, 3)
    assert "shorter than the shortest dense run, about which nothing can be said" in str(short)
    with pytest.raises(ValueError, match="margin=0"):
        judge({}, dense, 0)


def test_the_dense_network_itself_does_not_pay_between_two_runs_far_apart() -> None:
    """Its accuracy levels off, so a straight line between few runs lies below it."""
    dense = {s: {"short": Point(10, 0.5), "full": Point(100, 0.96 + s / 1000)} for s in range(5)}
    between = judge({s: Point(50, 0.95 + s / 1000) for s in range(5)}, dense, 0.01)
    assert between.verdict == CANNOT_TELL and "one of some 50 s would tell" in str(between)
    better = judge({s: Point(50, 0.97 + 2 * s / 1000) for s in range(5)}, dense, 0.01)
    assert better.verdict == PAYS, "sooner and better than the full run"
    closer = {s: runs | {"half": Point(45, 0.94 + s / 1000)} for s, runs in dense.items()}
    assert judge({s: Point(50, 0.95 + s / 900) for s in range(5)}, closer, 0.01).verdict == PAYS


def test_no_scatter_is_no_certainty() -> None:
    dense = {s: {"sooner": Point(10, 0.3), "full": Point(20, 0.3)} for s in range(4)}
    for accuracy, verdict in ((0.3, DOES_NOT_PAY), (0.1 + 0.2, DOES_NOT_PAY), (0.3 + 1 / 360, CANNOT_TELL)):
        assert judge({s: Point(15, accuracy) for s in range(4)}, dense, 0.01).verdict == verdict
