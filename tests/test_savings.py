"""What a method saves against the dense network of its own accuracy, and the table of all arms that says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from experiment_records import cut, declared, write
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_report import ARMS, EPOCHS, SEEDS, THREE, metrics, t_interval

from morphtrain.evidence.frontier import Point
from morphtrain.evidence.savings import savings
from morphtrain.evidence.summary import summary
from morphtrain.experiment.answer import show_answer
from morphtrain.report.build import read

ACCURACIES = {"quarter": 0.90, "half": 0.94, "full": 0.96, "narrow": 0.93}
SECONDS = {"quarter": 10.0, "half": 20.0, "full": 40.0, "narrow": 30.0}
LUCK = (-0.004, 0.001, 0.003, 0.0)  # of a seed, all arms alike


def dense(seeds: int = 4) -> dict[int, dict[str, Point]]:
    return {
        seed: {arm: Point(SECONDS[arm] * 1.1**seed, ACCURACIES[arm] + LUCK[seed]) for arm in SECONDS}
        for seed in range(seeds)
    }


def method(seconds: float, accuracy: float) -> dict[int, Point]:
    return {seed: Point(seconds * 1.1**seed, accuracy + LUCK[seed]) for seed in range(4)}


@pytest.mark.parametrize(
    ("accuracy", "arms", "costs", "ahead"),
    [
        (0.95, ("half", "full"), 20 * 2**0.5, 0.0),
        (0.91, ("quarter", "half"), 10 * 2**0.25, 0.0),
        (0.94, ("quarter", "half"), 20, 0.0),
        (0.97, ("full",), 40, 0.01),
        (0.89, ("quarter",), 10, -0.01),
    ],
)
def test_a_method_is_held_against_the_dense_network_of_its_accuracy(
    accuracy: float, arms: tuple[str, ...], costs: float, ahead: float
) -> None:
    """The narrow arm is no point of the curve: a faster one is better."""
    found = savings(method(15.0, accuracy), dense())
    assert found.arms == arms
    assert found.seconds.mean == pytest.approx(15 / costs)
    assert found.accuracy.mean == pytest.approx(ahead, abs=1e-12)


def test_the_intervals_are_over_the_seeds_that_both_have() -> None:
    rng = np.random.default_rng(1)
    ours = {seed: Point(15 * 1.1**seed * rng.lognormal(0, 0.05), rng.normal(0.95, 0.004)) for seed in (1, 2, 3, 9)}
    found = savings(ours, dense())
    means = {arm: np.mean([dense()[seed][arm].accuracy for seed in (1, 2, 3)]) for arm in ("half", "full")}
    share = (np.mean([ours[seed].accuracy for seed in (1, 2, 3)]) - means["half"]) / (means["full"] - means["half"])
    assert 0 < share < 1, "or the example is another one"
    logs = [np.log(ours[seed].seconds / (20 * 2**share * 1.1**seed)) for seed in (1, 2, 3)]
    mean, low, high = np.exp(t_interval(logs))
    assert (found.seconds.mean, found.seconds.low, found.seconds.high) == pytest.approx((mean, low, high))
    differences = [found.ours[seed] - (0.94 + 0.02 * share + LUCK[seed]) for seed in (1, 2, 3)]
    wanted = stats.t.interval(0.95, 2, 0, stats.sem(differences))
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx(wanted)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(accuracy=st.floats(0.85, 1), more=st.floats(0, 0.1))
def test_the_more_accurate_a_method_the_more_it_saves(accuracy: float, more: float) -> None:
    worse, better = (savings(method(15, value), dense()).seconds.mean for value in (accuracy, accuracy + more))
    assert better <= worse + 1e-9


def test_it_takes_a_seed_and_a_dense_arm_of_all_seeds() -> None:
    with pytest.raises(ValueError, match="a dense arm that every seed has"):
        savings({7: Point(1, 1)}, dense())


def answer_of(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The cells of each arm in the table that is printed, and the lines below it."""
    show_answer(directory)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if "│" in line]
    return {row[0]: row for row in rows if row[0]}, [line for line in lines if line[:1].isalpha()]


def test_the_console_shows_each_arm_and_the_answer_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write(tmp_path, declared("pays", ARMS, SEEDS), metrics, EPOCHS)
    rows, lines = answer_of(directory, capsys)
    assert list(rows) == list(ARMS)
    assert f"answer: {read(directory, tmp_path).answer}" in lines
    assert rows["good"][-1] == "pays" and rows["poor"][-1] == "does not pay" and rows["dense"][-1] == "-"
    logs = {arm: np.log([metrics(arm, seed, EPOCHS)["calibrated_train_seconds"] for seed in SEEDS]) for arm in ARMS}
    for cell, wanted in (
        (rows["good"][1], np.exp(t_interval(logs["good"]))),
        (rows["good"][2], np.exp(t_interval(logs["good"] - logs["dense"]))),
        (rows["good"][3], t_interval([metrics("good", seed, EPOCHS)["test_accuracy"] for seed in SEEDS])),
    ):
        shown = [float(number.strip("[,]")) for number in cell.split()]
        assert shown == pytest.approx(wanted, rel=0.02), cell
    assert rows["dense"][2] == "-"


def test_other_questions_have_no_verdict_and_what_decides_as_a_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_loss(arm: str, seed: int, epoch: int) -> Mapping[str, float]:
        return {**metrics(arm, seed, epoch), "val_loss": len(arm) / 10 + seed / 1000}

    directory = write(tmp_path / "a", declared("ratio", THREE, SEEDS, response="val_loss"), with_loss, EPOCHS)
    rows, lines = answer_of(directory, capsys)
    assert len(rows["good"]) == 5
    assert float(rows["good"][4].split()[0]) == pytest.approx(0.404, rel=0.01)
    assert any(line.startswith("answer: ") for line in lines)

    def nothing(arm: str, seed: int, epoch: int) -> Mapping[str, float]:
        return {**metrics(arm, seed, epoch), "calibrated_train_seconds": 0.0}

    rows, lines = answer_of(write(tmp_path / "b", declared("ratio", THREE, SEEDS), nothing, EPOCHS), capsys)
    assert rows == {}
    assert lines[0].startswith("no table of the arms: values=[0.0, ")
    assert lines[1].startswith("answer: These numbers cannot be analysed: ")


def test_arms_with_fewer_runs_say_so(tmp_path: Path) -> None:
    directory = write(tmp_path, declared("ratio", THREE, SEEDS), metrics, EPOCHS)
    assert f"over {len(SEEDS)} seeds" in read_summary(directory)[0]
    cut(directory, 3, "poor", 0)
    caption, seeds = read_summary(directory)
    assert "over the seeds" in caption and seeds == {"dense": 7, "good": 7, "poor": 6}


def read_summary(directory: Path) -> tuple[str, dict[str, int]]:
    question = read(directory, directory.parent)
    found = summary(question.experiment, question.finished)
    return found.caption, found.frame["seeds"].to_dict() if "seeds" in found.frame else {}
