"""Times taken in turns: the ratio holds on a machine that drifts, and what is wrong with a measurement is named."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from morphtrain.compare.turns import in_turns
from morphtrain.evidence.interleaved import Turns, block_ratio, blocks, doubts
from morphtrain.evidence.repeats import Estimate

PAIRS, PARTS = 10, 8


class Machine:
    """Its clock: what takes a second when nothing is wrong takes longer as its speed drifts and others disturb it.

    Args:
        drift: of the logarithm of the time, in all.
        noise: standard deviation of the logarithm, with a correlation of `memory` from one piece of work to the next.
        pulse: of the logarithm, once in every `period` pieces of work.
        grain: how many pieces a second of work has; its speed changes from one to the next.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        drift: float = 0.0,
        noise: float = 0.0,
        memory: float = 0.0,
        pulse: float = 0.0,
        period: int = 4,
        grain: int = 1,
    ) -> None:
        self.grain, number = grain, 2 * PAIRS * grain
        shocks = rng.normal(0, noise * math.sqrt(1 - memory**2), number)
        shocks[0] = rng.normal(0, noise)
        state = list(itertools.accumulate(shocks, lambda before, shock: memory * before + shock))
        wave = np.sin(np.linspace(0, 2, number) + rng.uniform(0, 2 * math.pi))  # slow, but no straight line
        pulses = pulse * (np.arange(number) % period == rng.integers(period))
        self.factors = iter(np.exp(drift * (np.linspace(0, 1, number) + 0.2 * wave) + state + pulses))

    def work(self, seconds: float, parts: int = 1) -> Iterator[float | None]:
        """What takes so many seconds when nothing is wrong, `PAIRS` times, and each time in so many turns."""
        for _ in range(PAIRS):
            spent = 0.0
            for part in range(parts):
                if part:
                    yield None
                spent += seconds / self.grain * sum(itertools.islice(self.factors, self.grain // parts))
            yield spent


class Fixed(random.Random):
    """Draws the order A B B A A B B A, always."""

    def shuffle(self, x: Any) -> None:
        x.sort()


def measured(machine: Machine, ratio: float, order: random.Random, parts: int = 1) -> tuple[list[float], list[float]]:
    seconds: dict[str, list[float]] = {"A": [], "B": []}
    sides = {"A": machine.work(1.0, parts), "B": machine.work(ratio, parts)}
    for name, spent in in_turns(sides, rng=order):
        if spent is not None:
            seconds[name].append(spent)
    return seconds["A"], seconds["B"]


def in_parts(machine: Machine, ratio: float, order: random.Random) -> Estimate:
    """What is found if each piece of work is done in several turns."""
    found = Turns(*measured(machine, ratio, order, PARTS), "epoch", parts=PARTS).ratio
    assert found is not None and found.n == PAIRS
    return found


def names(a: int, b: int, warmup: int = 0, order: random.Random | None = None) -> str:
    """The turns of sides that have so many pieces of work each."""
    return "".join(name for name, _ in in_turns({"A": iter(range(a)), "B": iter(range(b))}, warmup, order))


def test_who_ends_leaves_the_other_to_go_on() -> None:
    assert names(5, 3, order=Fixed()) == "ABBAABAA"
    assert list(in_turns({"A": iter([None])})) == [("A", None)]
    assert names(0, 0) == ""


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(1, 8), st.randoms(use_true_random=False))
def test_after_the_warm_up_come_whole_blocks_of_either_order(warmup: int, number: int, order: random.Random) -> None:
    turns = names(warmup + 2 * number, warmup + 2 * number, warmup, order)
    assert sorted(turns) == sorted("AB" * (warmup + 2 * number))
    counted = turns[2 * warmup :]
    assert {counted[n : n + 4] for n in range(0, len(counted), 4)} <= {"ABBA", "BAAB"}


def test_each_order_is_as_likely_and_drawn_without_the_random_numbers_of_the_sides() -> None:
    before = random.getstate()
    turns = names(2 * 1000, 2 * 1000)
    assert random.getstate() == before
    starts = [turns[n] for n in range(0, len(turns), 4)]
    assert abs(starts.count("A") - 500) < 80  # five standard deviations
    assert abs(sum(one == other for one, other in itertools.pairwise(starts)) - 500) < 80
    assert names(200, 200) != names(200, 200)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.2, 5), st.floats(-0.1, 0.1), st.integers(2, 30))
def test_a_steady_drift_cancels_in_every_block(ratio: float, drift: float, pairs: int) -> None:
    order = names(pairs, pairs, order=random.Random(pairs))
    times = [(name, math.exp(drift * turn) * (ratio if name == "B" else 1)) for turn, name in enumerate(order)]
    a, b = ([spent for name, spent in times if name == side] for side in "AB")
    found = block_ratio(a, b)
    assert found is not None
    assert found.n == pairs // 2
    assert found.mean == pytest.approx(ratio, rel=1e-9)
    if found.n >= 3:
        assert (found.low, found.high) == pytest.approx((ratio, ratio), rel=1e-6)


def test_the_interval_is_students_of_the_blocks_logarithms() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(size=11), rng.lognormal(size=11)  # the eleventh pair has no second one
    logs = np.log(b / a)[:10].reshape(5, 2).mean(1)
    wanted = stats.t.interval(0.95, 4, logs.mean(), stats.sem(logs))
    found = block_ratio(a, b)
    assert found is not None
    assert (found.low, found.mean, found.high) == pytest.approx(tuple(np.exp([wanted[0], logs.mean(), wanted[1]])))
    assert [len(side) for side in blocks(a, b)] == [5, 5]
    assert block_ratio(a[:1], b[:1]) is None


def test_the_same_work_twice_is_told_apart_as_seldom_as_promised_and_not_so_one_after_the_other() -> None:
    """With 15 % of drift and noise that remembers; the limits are five standard deviations of the count."""
    rng, order, tries, wrong, sequential = np.random.default_rng(1), random.Random(1), 2000, 0, 0
    for _ in range(tries):
        a, b = measured(Machine(rng, drift=rng.choice([-0.15, 0.15]), noise=0.05, memory=0.5), 1.0, order)
        found = block_ratio(a, b)
        wrong += not found.low <= 1 <= found.high
        turns = [spent for pair in zip(a, b, strict=True) for spent in pair]
        sequential += stats.ttest_ind(turns[:PAIRS], turns[PAIRS:], equal_var=False).pvalue < 0.05
    assert 0.03 < wrong / tries < 0.075
    assert sequential / tries > 0.3


@pytest.mark.parametrize(("order", "low", "high"), [(Fixed(), 0.9, 1.0), (random.Random(2), 0.03, 0.1)])
def test_what_comes_every_fourth_turn_is_not_held_against_one_side(
    order: random.Random, low: float, high: float
) -> None:
    """Always A B B A, it would be: the interval is narrow and wrong. The five blocks have one sign by chance in 6 %."""
    rng, tries, wrong = np.random.default_rng(3), 1000, 0
    for _ in range(tries):
        found = block_ratio(*measured(Machine(rng, noise=0.01, pulse=0.07), 1.0, order))
        wrong += not found.low <= 1 <= found.high
    assert low < wrong / tries <= high


def test_a_tenth_is_found_with_ten_pairs() -> None:
    rng, order, tries = np.random.default_rng(2), random.Random(3), 500
    results = [block_ratio(*measured(Machine(rng, 0.15, 0.05, 0.5), 1.1, order)) for _ in range(tries)]
    assert sum(found.low > 1 for found in results) > 0.9 * tries
    assert statistics.fmean(found.mean for found in results) == pytest.approx(1.1, rel=0.01)


# -- a time in several turns -----------------------------------------------------------------------------------------


class Slowing(Machine):
    """Every piece of work takes longer than the one before, by as much."""

    def __init__(self, slower: float) -> None:
        self.grain, self.factors = PARTS, iter(1 + slower * np.arange(2 * PAIRS * PARTS))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 5), st.floats(0, 1), st.randoms(use_true_random=False))
def test_a_steady_drift_cancels_in_every_pair(ratio: float, slower: float, order: random.Random) -> None:
    found = in_parts(Slowing(slower), ratio, order)
    assert (found.low, found.mean, found.high) == pytest.approx((ratio,) * 3, rel=1e-9)
    assert found.values == pytest.approx((ratio,) * PAIRS, rel=1e-9)


@pytest.mark.parametrize("memory", [0.0, 0.9, 0.99, 0.999])
def test_the_same_work_twice_in_parts_is_told_apart_as_seldom_as_promised(memory: float) -> None:
    """Whatever the noise remembers: each block's order is drawn. The limits are four standard deviations."""
    rng, order, tries, wrong = np.random.default_rng(4), random.Random(4), 600, 0
    for _ in range(tries):
        found = in_parts(Machine(rng, noise=0.15, memory=memory, grain=PARTS), 1.0, order)
        wrong += not found.low <= 1 <= found.high
    assert 0.015 < wrong / tries < 0.086


def test_beside_load_a_tenth_is_found_in_parts_and_not_in_whole_epochs() -> None:
    """What others do goes on for an epoch or two, which falls to one side, or in parts to both."""
    rng, order, tries = np.random.default_rng(5), random.Random(5), 300
    whole, parts = [], []
    for _ in range(tries):
        made = [Machine(rng, noise=0.15, memory=0.93, grain=PARTS) for _ in range(2)]
        whole.append(block_ratio(*measured(made[0], 1.1, order)))
        parts.append(in_parts(made[1], 1.1, order))
    assert sum(found.low > 1 for found in whole) < 0.75 * tries
    assert sum(found.low > 1 for found in parts) > 0.95 * tries
    assert statistics.fmean(found.mean for found in parts) == pytest.approx(1.1, rel=0.01)


# -- what makes it doubtful ------------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)
CALM = list(RNG.lognormal(0, 0.01, 24))
SAME = list(RNG.lognormal(0, 0.01, 24))
WILD = [spent * (1.25 if number // 2 % 2 else 1) for number, spent in enumerate(SAME)]
ONCE = [spent * (3 if number == 7 else 1) for number, spent in enumerate(SAME)]
SHRINKING = [spent * (1 - number / 40) for number, spent in enumerate(SAME)]


def times(seconds: list[float], factors: list[float]) -> list[float]:
    return [spent * factor for spent, factor in zip(seconds, factors, strict=True)]


SLOW = [1 + 0.4 * number / 23 for number in range(24)]
SHORT = [1 / 500] * 24

DOUBTS = {
    "too few for an interval": (Turns(CALM[:5], SAME[:5], "epoch"), ["only 2 blocks", "no interval", "more epochs"]),
    "few": (Turns(CALM[:8], SAME[:8], "step"), ["only 4 blocks", "--steps"]),
    "few pairs": (Turns(CALM[:4], SAME[:4], "epoch", parts=2), ["only 4 pairs", "more epochs"]),
    "scattered": (Turns(CALM, WILD, "epoch"), ["scatters by", "timing.cores=1"]),
    "one outlier": (Turns(CALM, ONCE, "epoch"), ["1 of 24 pairs", "quieter"]),
    "a ratio that changes": (Turns(CALM, SHRINKING, "epoch", True), ["goes from 0.9", "to 0.5", "architecture="]),
    "a machine that drifts": (
        Turns(times(CALM, SLOW), times(SAME, SLOW), "epoch"),
        ["% slower", "plug it in"],
    ),
    "others": (Turns(CALM, SAME, "epoch", False, 0.31), ["31%", "timing.cores"]),
    "another run": (Turns(CALM, SAME, "epoch", False, 0.31, [17]), ["process 17 trained", "timing.when_busy=wait"]),
    "short": (Turns(times(CALM, SHORT), times(SAME, SHORT), "step"), ["a step takes 2 ms", "a larger batch"]),
    "short turns": (Turns([0.02] * 24, [0.03] * 24, "epoch", parts=8), ["a turn takes 2.5 ms", "a larger batch"]),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_what_is_wrong_is_named_with_the_number_and_what_would_help(name: str) -> None:
    turns, words = DOUBTS[name]
    said = doubts(turns)
    if name == "one outlier":  # which scatters, too
        said = [doubt for doubt in said if "scatters" not in doubt]
    assert len(said) == 1, said
    for word in words:
        assert word in said[0], said


def test_a_calm_measurement_is_not_doubted() -> None:
    assert doubts(Turns(CALM, [1.3 * spent for spent in SAME], "epoch", False, 0.02)) == []
    both = Turns(times(CALM, SLOW[::-1]), times(SAME, SLOW[::-1]), "epoch", changed=True)
    assert doubts(both) == []
