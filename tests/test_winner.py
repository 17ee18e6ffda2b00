"""What the best of a search saves: against independent numbers, wrong as seldom as it says, honest if it is nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from morphtrain.evidence import winner
from morphtrain.evidence.winner import CANNOT_TELL, SAVES, SAVES_NOTHING, expected, judge

SEEDS = (2, 3, 4, 5, 6)
SLOW = dict(zip(SEEDS, (10.0, 11.0, 10.5, 9.8, 10.2), strict=True))
LUCK = dict(zip(SEEDS, (1.02, 0.97, 1.0, 1.01, 0.99), strict=True))


def times(factor: float, *seeds: int) -> dict[int, float]:
    """What an arm takes that takes this share of `SLOW`, with a scatter of its own; with all seeds if none is given."""
    return {seed: factor * SLOW[seed] * LUCK[seed] for seed in seeds or SEEDS}


def test_a_saving_is_what_scipy_says() -> None:
    arms = {"dense": SLOW, "sooner": times(0.8), "trial_7": times(0.5)}
    found = judge(arms, ["trial_7"], ["dense", "sooner"], 5)
    assert (found.verdict, found.arm, found.baseline) == (SAVES, "trial_7", "sooner")
    logs = np.log([arms["trial_7"][seed] / arms["sooner"][seed] for seed in SEEDS])
    assert found.ratio is not None
    assert found.ratio.mean == pytest.approx(np.exp(logs.mean())) == pytest.approx(0.625)
    found = judge(
        {**arms, "trial_8": times(0.6), "trial_9": times(0.7)}, ["trial_7", "trial_8", "trial_9"], ["dense"], 5
    )
    logs = np.log([arms["trial_7"][seed] / SLOW[seed] for seed in SEEDS])
    interval = stats.t.interval(1 - 0.05 / 3, 4, logs.mean(), stats.sem(logs))
    assert found.ratio is not None
    assert (found.ratio.low, found.ratio.high) == pytest.approx(tuple(np.exp(interval)))
    assert str(found).startswith("saves 50 %: trial_7 takes 0.49")
    assert "of what the best baseline takes, dense (5 seeds, with 95 % for all 3 that it was chosen from)" in str(found)


def test_a_trial_that_is_no_faster_saves_nothing() -> None:
    found = judge({"dense": times(0.8), "trial_7": times(0.99)}, ["trial_7"], ["dense"], 5)
    assert found.verdict == SAVES_NOTHING
    assert str(found).startswith("saves nothing: trial_7 takes 1.2")


def test_what_scatters_more_than_it_saves_is_not_told() -> None:
    noisy = {seed: SLOW[seed] * factor for seed, factor in zip(SEEDS, (0.5, 1.2, 0.8, 1.3, 0.7), strict=True)}
    found = judge({"dense": SLOW, "trial_7": noisy}, ["trial_7"], ["dense"], 5)
    assert found.verdict == CANNOT_TELL
    assert found.seeds_needed is not None and found.seeds_needed > 5
    assert f"{found.seeds_needed} seeds would tell, with a probability of 80 %" in str(found)


def test_runs_that_miss_the_target_count_against_an_arm() -> None:
    """Twice as fast where it gets there, and it gets there in two of five."""
    arms = {"dense": SLOW, "trial_7": times(0.5, 2, 3), "trial_8": times(0.9)}
    assert expected(arms["trial_7"], 5) > expected(arms["trial_8"], 5) > expected(arms["dense"], 5) * 0.85
    found = judge(arms, ["trial_7", "trial_8"], ["dense"], 5)
    assert found.arm == "trial_8"
    found = judge({"dense": SLOW, "trial_7": times(0.3, 2, 3, 4)}, ["trial_7"], ["dense"], 5)
    assert found.verdict == CANNOT_TELL, "however fast: the baseline reaches it every time"
    assert "the target was reached by trial_7 with 3 of 5 seeds and dense with 5 of 5 seeds" in str(found)
    assert found.seeds_needed is None, "more seeds would not change that"


def test_without_a_run_that_counts_it_is_said_so() -> None:
    assert str(judge({"dense": SLOW, "a": {}}, ["a"], ["dense"], 5)) == (
        "saves nothing: none of 1 trial reached the target again"
    )
    found = judge({"dense": {}, "a": times(0.5)}, ["a"], ["dense"], 5)
    assert found.verdict == CANNOT_TELL and "no baseline reached the target again" in str(found)
    found = judge({"dense": times(1, 2, 3), "a": times(0.5, 4, 5, 6)}, ["a"], ["dense"], 5)
    assert found.verdict == CANNOT_TELL and "none of these is the same" in str(found)


def test_choosing_the_luckiest_of_three_finds_no_saving_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """All take the same. Without the correction 6 % of these searches would be said to save something."""
    monkeypatch.setattr(winner, "_seeds_needed", lambda *_: None)  # slow
    rng = np.random.default_rng(0)
    names = ["dense", "a", "b", "c"]
    verdicts = []
    for _ in range(1500):
        drawn = rng.lognormal(0, 0.1, (4, 5)) * rng.lognormal(0, 0.3, 5)
        arms = {name: dict(zip(SEEDS, map(float, row), strict=True)) for name, row in zip(names, drawn, strict=True)}
        verdicts.append(judge(arms, names[1:], names[:1], 5).verdict)
    assert 0.005 < verdicts.count(SAVES) / len(verdicts) < 0.04
