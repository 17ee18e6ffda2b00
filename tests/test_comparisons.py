"""Tests of groups of runs: against scipy and closed forms, and how often they are wrong, counted in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from morphtrain.evidence.comparisons import (
    DIFFERENCE,
    RATIO,
    compare_groups,
    compare_pairs,
    least_pairs,
)
from morphtrain.evidence.margins import groups_within, pairs_within
from morphtrain.evidence.power import pairs_needed, power_of_groups, power_of_pairs, runs_needed
from morphtrain.evidence.variance import compare_blocks, compare_many, corrected, nothing_to_test

NAMES = ("ours", "theirs")
SIZES = st.integers(6, 15)
SEEDS = st.integers(0, 2**32 - 1)
CLOSE = 1e-8
# Sleep gained by ten patients with one drug and with another: Student 1908, the example of the paired t test.
FIRST = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
SECOND = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))


def test_students_own_example() -> None:
    found = compare_pairs(SECOND, FIRST, DIFFERENCE, names=NAMES)
    assert (found.effect, found.low, found.high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-7)
    assert found.p == pytest.approx(0.00283289, abs=1e-8)
    assert found.significant


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=SIZES, seed=SEEDS, confidence=st.floats(0.9, 0.96))
def test_pairs_are_scipys_tests_of_log_ratios(n: int, seed: int, confidence: float) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = np.exp(rng.normal(size=(2, n)))
    shuffled = rng.permutation(n)
    found = compare_pairs(
        {int(s): ours[s] for s in shuffled} | {-1: 5.0},
        dict(enumerate(theirs)),
        RATIO,
        names=NAMES,
        confidence=confidence,
    )
    wanted = stats.ttest_rel(np.log(ours), np.log(theirs))
    interval = wanted.confidence_interval(confidence)
    assert found.n == (n,)
    assert found.p == pytest.approx(wanted.pvalue, rel=CLOSE)
    assert found.rank_p == pytest.approx(stats.wilcoxon(np.log(ours / theirs)).pvalue, rel=CLOSE)
    assert found.effect == pytest.approx(stats.gmean(ours / theirs), rel=CLOSE)
    assert np.log((found.low, found.high)) == pytest.approx((interval.low, interval.high), rel=CLOSE, abs=CLOSE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=SIZES, m=st.integers(3, 9), seed=SEEDS, scale=st.sampled_from([RATIO, DIFFERENCE]))
def test_groups_are_scipys_welch_test(n: int, m: int, seed: int, scale: str) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = np.exp(rng.normal(size=n)), np.exp(rng.normal(0.5, 2, size=m))
    found = compare_groups(ours, theirs, scale, names=NAMES)
    a, b = (np.log(ours), np.log(theirs)) if scale == RATIO else (ours, theirs)
    wanted = stats.ttest_ind(a, b, equal_var=False)
    back = np.log if scale == RATIO else np.asarray
    assert found.p == pytest.approx(wanted.pvalue, rel=CLOSE)
    assert back(found.effect) == pytest.approx(a.mean() - b.mean(), rel=CLOSE, abs=CLOSE)
    assert back((found.low, found.high)) == pytest.approx(tuple(wanted.confidence_interval()), rel=CLOSE, abs=CLOSE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=SIZES, seed=SEEDS, margin=st.floats(0.1, 1))
def test_equivalence_is_two_one_sided_tests_and_an_interval_within_the_margin(n: int, seed: int, margin: float) -> None:
    ours, theirs = np.random.default_rng(seed).normal(size=(2, n))
    pairs = dict(enumerate(ours)), dict(enumerate(theirs))
    both = pairs_within(*pairs, DIFFERENCE, below=margin, above=margin, names=NAMES)
    no_worse = pairs_within(*pairs, DIFFERENCE, below=margin, names=NAMES)
    over, under = (
        stats.ttest_1samp(ours - theirs, bound, alternative=side).pvalue
        for bound, side in ((-margin, "greater"), (margin, "less"))
    )
    assert both.p == pytest.approx(max(over, under), rel=CLOSE)
    assert no_worse.p == pytest.approx(over, rel=CLOSE)
    assert both.shown == (-margin < both.low and both.high < margin)
    apart = groups_within(ours, theirs, DIFFERENCE, below=margin, names=NAMES)
    assert apart.p == pytest.approx(
        stats.ttest_ind(ours + margin, theirs, equal_var=False, alternative="greater").pvalue, rel=CLOSE
    )


def test_a_margin_of_a_ratio_reads_the_same_from_both_sides() -> None:
    ours, theirs = np.exp(np.random.default_rng(0).normal(0, 0.05, (2, 8)))
    a, b = dict(enumerate(ours)), dict(enumerate(theirs))
    found = [pairs_within(*pair, RATIO, below=0.1, above=0.1, names=NAMES) for pair in ((a, b), (b, a))]
    assert found[0].p == pytest.approx(found[1].p, rel=CLOSE)
    assert (found[0].lowest, found[0].highest) == pytest.approx((1 / 1.1, 1.1))
    assert "is equivalent within 0.9091 to 1.1" in str(found[0])


def test_bca_is_scipys_and_the_same_each_time() -> None:
    found = [compare_pairs(SECOND, FIRST, DIFFERENCE, names=NAMES) for _ in range(2)]
    assert found[0].bootstrap == found[1].bootstrap
    wanted = stats.bootstrap(
        (np.array(list(SECOND.values())) - np.array(list(FIRST.values())),), np.mean, rng=7, n_resamples=50000
    ).confidence_interval
    assert found[0].bootstrap == pytest.approx((wanted.low, wanted.high), abs=0.05)


def test_fewer_than_six_pairs_show_no_p() -> None:
    """The clearest result of five pairs, all of one sign, has p = 1/16 in a rank test."""
    assert [least_pairs(confidence) for confidence in (0.9, 0.95, 0.99)] == [5, 6, 8]
    assert stats.wilcoxon([1, 2, 3, 4, 5]).pvalue == 2 / 2**5
    ours, theirs = {s: 1.0 + s / 100 for s in range(6)}, {s: 2.0 + s / 10 for s in range(6)}
    six = compare_pairs(ours, theirs, RATIO, names=NAMES)
    five = compare_pairs({s: ours[s] for s in range(5)}, theirs, RATIO, names=NAMES)
    assert six.significant and "p = " in str(six)
    assert not five.significant and five.rank_p is None
    assert "5 pairs" in str(five) and "significance out of reach: 6 pairs" in str(five) and "p = " not in str(five)


def test_what_does_not_scatter_has_no_p() -> None:
    pairs = compare_pairs(dict.fromkeys(range(7), 19218), dict.fromkeys(range(7), 27000), RATIO, names=NAMES)
    assert pairs.p is None and pairs.bootstrap is None and not pairs.significant
    assert pairs.low == pytest.approx(pairs.effect) == pairs.high
    assert "nothing scatters" in str(pairs)
    with pytest.raises(ValueError, match="all alike"):
        groups_within([1, 1, 1], [2, 2, 2], DIFFERENCE, above=1, names=NAMES)


def test_groups_that_leave_nothing_to_test_are_refused_in_words() -> None:
    constant = {"a": [1.0] * 4, "b": [2.0] * 4}
    with pytest.raises(ValueError, match="so the differences between groups are exact: there is nothing"):
        compare_many(constant, DIFFERENCE)
    with pytest.raises(ValueError, match="all values are equal: there is nothing to test"):
        compare_many({"a": [0.3] * 4, "b": [0.1 + 0.2] * 4}, DIFFERENCE)
    times = {"a": {1: 3.0, 2: 5.0, 3: 0.7}}
    for factor, words in ((1.0, "equal in every block"), (1.1, "equally far apart in every block")):
        groups = {**times, "b": {seed: factor * value for seed, value in times["a"].items()}}
        assert words in nothing_to_test(groups, RATIO)
        with pytest.raises(ValueError, match=words):
            compare_blocks(groups, RATIO)
    scattered = {**times, "b": {1: 3.0, 2: 5.0, 3: 0.7000001}}
    assert nothing_to_test(scattered, RATIO) == "" and compare_blocks(scattered, RATIO).p > 0.3
    assert nothing_to_test({"a": {1: 1.0}, "b": {1: 2.0}}, RATIO) == "", "too few say nothing"


@pytest.mark.parametrize(
    ("ours", "scale", "message"),
    [
        ({7: 1.0}, RATIO, "one or more"),
        ({0: math.nan}, DIFFERENCE, "finite"),
        ({0: -1.0}, RATIO, "above 0"),
        ({0: 1.0}, "log", "scale='log'"),
    ],
)
def test_what_cannot_be_compared_is_refused(ours: dict[int, float], scale: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_pairs(ours, {0: 1.0}, scale, names=NAMES)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(3, 9), groups=st.integers(2, 5), seed=SEEDS)
def test_variance_is_that_of_the_closed_forms(n: int, groups: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=(groups, n)) + np.arange(n)
    named = {str(g): list(y[g]) for g in range(groups)}
    one_way = compare_many(named, DIFFERENCE)
    wanted = stats.f_oneway(*y)
    assert (one_way.f, one_way.p) == pytest.approx((wanted.statistic, wanted.pvalue), rel=CLOSE)
    means = y.mean(1, keepdims=True)
    share = n * ((means - y.mean()) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert one_way.effect == pytest.approx(share, rel=CLOSE)
    for share, level in ((one_way.low, 0.975), (one_way.high, 0.025)):
        if share > 0:  # the noncentrality that makes this F as rare as that
            shift = groups * n * share / (1 - share)
            assert stats.ncf.cdf(one_way.f, groups - 1, groups * (n - 1), shift) == pytest.approx(level, abs=1e-6)
        else:
            assert stats.f.cdf(one_way.f, groups - 1, groups * (n - 1)) < level
    blocked = compare_blocks({name: dict(enumerate(values)) for name, values in named.items()}, DIFFERENCE)
    between = n * ((means - y.mean()) ** 2).sum() / (groups - 1)
    freedom = (groups - 1) * (n - 1)
    rest = ((y - means - y.mean(0) + y.mean()) ** 2).sum() / freedom
    assert (blocked.f, blocked.p) == pytest.approx(
        (between / rest, stats.f.sf(between / rest, groups - 1, freedom)), rel=1e-6
    )
    assert len(blocked.pairs) == groups * (groups - 1) // 2


def test_holm_is_holm() -> None:
    """The sorted p are multiplied by what is left of the family, and never fall."""
    rng = np.random.default_rng(0)
    found = [compare_pairs(dict(enumerate(rng.normal(m, 1, 9))), FIRST, DIFFERENCE, names=NAMES) for m in (0, 2, 2, 4)]
    order = np.argsort([pair.p for pair in found])
    wanted, highest = {}, 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(found) - rank) * found[index].p))
        wanted[index] = highest
    assert [pair.p for pair in corrected(found)] == pytest.approx([wanted[i] for i in range(len(found))], rel=CLOSE)
    assert "corrected for 4 comparisons (Holm)" in str(corrected(found)[0])


def test_power_is_that_of_the_noncentral_t() -> None:
    for n in (3, 5, 10):
        critical = stats.t.isf(0.025, n - 1)
        shift = math.log(1.05) / 0.05 * math.sqrt(n)
        wanted = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        assert power_of_pairs(math.log(1.05), 0.05, n) == pytest.approx(wanted, abs=CLOSE)
    assert runs_needed(0.5, 1.0) == 64, "Cohen 1988, table 2.4.1"
    assert power_of_groups(0.5, 1.0, 64) == pytest.approx(0.8015, abs=1e-4)


def test_power_is_a_number_everywhere_and_grows_with_the_pairs() -> None:
    """Where one tail of the noncentral t is empty, scipy's has no digits, and a search for the least n went astray."""
    counts = [*range(6, 60), *(int(1.3**k) for k in range(16, 53))]
    for effect in (0, 1e-200, 0.01, 0.22, 0.45, 0.96, 50, 1e12):
        found = [power_of_pairs(effect, 1.0, n) for n in counts]
        assert all(0.05 - CLOSE <= power <= 1 for power in found), effect
        assert found == sorted(found), effect
        assert [power_of_groups(-effect, 1.0, n) for n in counts] == sorted(
            power_of_groups(effect, 1.0, n) for n in counts
        )
    for effect, wanted in ((0.96, 11), (0.45, 41), (0.22, 165)):
        assert pairs_needed(effect, 1.0) == wanted, "the number that statsmodels' solve_power finds"


@settings(max_examples=15, deadline=None, derandomize=True)
@given(effect=st.floats(0.05, 100), power=st.floats(0.5, 0.99))
def test_the_number_of_pairs_is_the_smallest_that_will_do(effect: float, power: float) -> None:
    n = pairs_needed(effect, 1.0, power)
    assert n is not None
    assert power_of_pairs(effect, 1.0, n) >= power
    assert n == 6 or power_of_pairs(effect, 1.0, n - 1) < power
    assert pairs_needed(1e-9, 1.0) is None


def drifting(rng: np.random.Generator, pairs: int, effect: float = 0.0) -> tuple[dict[int, float], dict[int, float]]:
    """Times with 5 % of scatter between the runs of a pair, on a machine that drifts by 15 % from pair to pair."""
    drift = rng.normal(0, 0.15, pairs)
    ours, theirs = (np.exp(drift + rng.normal(shift, 0.05 / math.sqrt(2), pairs)) for shift in (effect, 0.0))
    return dict(enumerate(ours)), dict(enumerate(theirs))


def found_by(rng: np.random.Generator, pairs: int, effect: float, times: int) -> float:
    found = (compare_pairs(*drifting(rng, pairs, effect), RATIO, names=NAMES).p for _ in range(times))
    return sum(p < 0.05 for p in found if p is not None) / times


@pytest.mark.parametrize("times", [1000, pytest.param(10000, marks=pytest.mark.slow)])
def test_what_slows_both_runs_of_a_pair_is_no_effect(times: int) -> None:
    assert 0.03 < found_by(np.random.default_rng(1), 8, 0.0, times) < 0.07


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_an_effect_of_five_percent_is_found_as_often_as_computed(pairs: int) -> None:
    effect = math.log(1.05)
    assert found_by(np.random.default_rng(2), pairs, effect, 5000) == pytest.approx(
        power_of_pairs(effect, 0.05, pairs), abs=0.025
    )


@pytest.mark.slow
def test_at_the_margin_equivalence_is_shown_in_one_of_twenty() -> None:
    rng = np.random.default_rng(3)
    at_margin = (drifting(rng, 10, math.log(1.1)) for _ in range(5000))
    shown = sum(pairs_within(*pair, RATIO, below=0.1, above=0.1, names=NAMES).shown for pair in at_margin)
    assert 0.03 < shown / 5000 < 0.07


@pytest.mark.slow
def test_of_families_without_an_effect_one_in_twenty_has_a_p_below_one_in_twenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three groups against a fourth: uncorrected, it would be one in nine."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels does so at every correction, for a twentieth of a second
    rng, wrong = np.random.default_rng(4), 0
    for _ in range(3000):
        first, *others = (dict(enumerate(values)) for values in rng.normal(size=(4, 8)))
        family = corrected([compare_pairs(other, first, DIFFERENCE, names=NAMES) for other in others])
        wrong += any(pair.significant for pair in family)
    assert 0.025 < wrong / 3000 < 0.06


@pytest.mark.slow
def test_intervals_of_bca_hold_the_truth() -> None:
    rng, held = np.random.default_rng(5), 0
    for _ in range(1500):
        low, high = compare_pairs(*drifting(rng, 40, math.log(1.05)), RATIO, names=NAMES).bootstrap or (0.0, 0.0)
        held += low < 1.05 < high
    assert 0.93 <= held / 1500 <= 0.97
