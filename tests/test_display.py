"""What a sweep shows while it goes on: counts of the study, the best so far, the time left, and whole lines."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from fork_server import ForkServer
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from morphtrain.sweep.attributes import METRICS_ATTR, SAME_RUN_ATTR
from morphtrain.sweep.display import Display, seconds_left
from morphtrain.wording import one_of_all, to_go

NOW = datetime(2026, 1, 31, 12)
ON_TERMINAL = str(Path(__file__).with_name("on_terminal.py"))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "less than a minute to go"),
        (59, "less than a minute to go"),
        (60, "1 min to go"),
        (99 * 60, "99 min to go"),
        (100 * 60, "1.7 h to go"),
        (3 * 24 * 3600, "72.0 h to go"),
    ],
)
def test_time_left_in_words(seconds: float, said: str) -> None:
    assert to_go(seconds) == said
    assert one_of_all(9, 15, "seed 3 dense", "  params 5", seconds) == f"   9/15 seed 3 dense:  params 5  ({said})"
    assert one_of_all(15, 15, "trial 3", " failed", None) == "  15/15 trial 3: failed"


def trial(number: int, state: TrialState, took: float = 0.0, **attrs: Any) -> FrozenTrial:
    """One that took so many seconds, or has been running for so long."""
    made = optuna.trial.create_trial(state=state, value=1.0 if state == TrialState.COMPLETE else None, user_attrs=attrs)
    made.number = number
    made.datetime_start = NOW - timedelta(seconds=took) if state != TrialState.WAITING else None
    made.datetime_complete = NOW if state.is_finished() else None
    return made


def ended(*seconds: float, state: TrialState = TrialState.COMPLETE, **attrs: Any) -> list[FrozenTrial]:
    return [trial(number, state, took, **attrs) for number, took in enumerate(seconds)]


@given(st.integers(1, 10**5), st.integers(1, 9), st.integers(1, 50), st.integers(1, 9))
def test_trials_that_all_take_the_same_take_it_again(seconds: int, done: int, left: int, side_by_side: int) -> None:
    """Against a count by hand: each of the workers has its share of what is left, if there is enough for all."""
    found = seconds_left(ended(*[float(seconds)] * done), done + left, side_by_side, NOW)
    assert found == pytest.approx(seconds * left / min(side_by_side, left), rel=1e-6)


def test_what_is_running_has_a_part_behind_it() -> None:
    halfway = trial(1, TrialState.RUNNING, 5.0)
    assert seconds_left([*ended(10.0), halfway], 4, 1, NOW) == pytest.approx(25.0)
    assert seconds_left([*ended(10.0), halfway], 4, 2, NOW) == pytest.approx(12.5)
    late = trial(1, TrialState.RUNNING, 500.0)
    assert seconds_left([*ended(10.0), late], 4, 1, NOW) == pytest.approx(20.0), "it may end any moment"
    ahead = trial(1, TrialState.RUNNING, -3600.0)
    assert seconds_left([*ended(10.0), ahead], 4, 1, NOW) == pytest.approx(30.0), "another machine's clock is ahead"
    queued = trial(1, TrialState.WAITING)
    assert seconds_left([*ended(10.0), queued], 4, 1, NOW) == pytest.approx(30.0)


def test_what_was_stopped_early_is_expected_as_often_as_it_was() -> None:
    stopped = ended(1.0, 1.0, 1.0, state=TrialState.PRUNED)
    assert seconds_left([*ended(10.0, 11.0, 12.0), *stopped], 16, 1, NOW) == pytest.approx(10 * (11 + 1) / 2)
    copies = ended(0.0, 0.0, 0.0, **{SAME_RUN_ATTR: 0})
    assert seconds_left([*ended(10.0, 11.0, 12.0), *copies], 16, 1, NOW) == pytest.approx(10 * 11 / 2)
    outlier = ended(10.0, 11.0, 5000.0)
    assert seconds_left(outlier, 4, 1, NOW) == pytest.approx(11.0), "a laptop that slept"


def test_nothing_is_said_before_the_first_and_after_the_last() -> None:
    assert seconds_left([trial(0, TrialState.RUNNING, 5.0)], 4, 1, NOW) is None
    assert seconds_left(ended(1.0, 1.0), 2, 1, NOW) is None


def tell(study: optuna.Study, value: float, accuracy: float = 0.9, excess: float = 0.0) -> int:
    trial = study.ask()
    trial.set_user_attr(METRICS_ATTR, {"train_seconds": value, "val_accuracy": accuracy, "params": 5000.0})
    trial.set_constraint("val_accuracy", excess)
    study.tell(trial, value)
    return trial.number


def test_each_end_is_shown_once_whoever_ran_it(capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(study_name="mine")
    display = Display(study, ["train_seconds"], 9, 1)
    display.look(set())
    assert capsys.readouterr().out == "", "nothing has ended yet"
    tell(study, 9.0)
    display.look(set())
    first = "   1/9 trial 0:  train_seconds 9  val_accuracy 0.9  params 5000  the best so far  ("
    assert capsys.readouterr().out.startswith(first)
    display.look(set())
    assert capsys.readouterr().out == ""
    tell(study, 12.0)
    tell(study, 3.0, 0.2, excess=0.5)
    study.tell(study.ask(), state=TrialState.FAIL)
    copy = study.ask()
    copy.set_user_attr(SAME_RUN_ATTR, 0)
    study.tell(copy, 9.0)
    early = study.ask()
    early.report(5.0, 3)
    study.tell(early, state=TrialState.PRUNED)
    display.look(set())
    lines = [re.sub(r"  \(.* to go\)$", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "   2/9 trial 1:  train_seconds 12  val_accuracy 0.9  params 5000",
        "   3/9 trial 2:  train_seconds 3  val_accuracy 0.2  params 5000  infeasible",
        "   4/9 trial 3: failed",
        "   5/9 trial 4: the same run as trial 0, whose values it takes",
        "   6/9 trial 5: stopped after epoch 3",
    ]
    assert display.progress == (
        "mine: 6 of 9 trials, 4 with a result, 1 stopped early, 1 failed; best so far: trial 0, train_seconds 9"
    )


def test_a_study_that_goes_on_begins_with_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(study_name="mine")
    for value in (9.0, 7.0):
        tell(study, value)
    Display(study, ["train_seconds"], 4, 1).look(set())
    assert capsys.readouterr().out == (
        "mine: 2 of 4 trials; best so far: trial 1, train_seconds 7  (less than a minute to go)\n"
    )


def test_workers_of_others_count_for_the_time_left() -> None:
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=1.0))
    display = Display(study, ["train_seconds"], 1000, 1)
    slow = study.get_trials(deepcopy=False)[0]
    slow.datetime_start, slow.datetime_complete = NOW, NOW + timedelta(hours=1)
    running = [study.ask() for _ in range(4)]

    def left(*own: int) -> str:
        display.known = None
        display.look({running[number]._trial_id for number in own})
        return display._line().rsplit("(", 1)[1]

    alone, with_others = left(0, 1, 2, 3), left(0)
    hours = [float(said.split()[0]) for said in (alone, with_others)]
    assert hours[0] == pytest.approx(999, rel=0.01)
    assert hours[1] == pytest.approx(999 / 4, rel=0.01)


def test_the_front_of_two_metrics_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(study_name="two", directions=["minimize", "maximize"])
    display = Display(study, ["macs", "val_accuracy"], 4, 1)
    display.look(set())
    for macs, accuracy in ((10.0, 0.9), (5.0, 0.8), (20.0, 0.5)):
        trial = study.ask()
        trial.set_user_attr(METRICS_ATTR, {"val_accuracy": accuracy})
        study.tell(trial, [macs, accuracy])
    display.look(set())
    out = capsys.readouterr().out
    assert "trial 1:  macs 5  val_accuracy 0.8  the best so far" in out
    assert "trial 2:  macs 20  val_accuracy 0.5  (" in out
    assert "front so far: trials 0, 1" in display.progress


SENT = re.compile(r"([^\x1b\r\n]+)|\x1b\[([\d;?]*)([A-Za-z])|([\r\n])")


def screen(sent: str) -> list[str]:
    """The lines that a terminal shows in the end: text, colours, carriage return, cursor up, erase line."""
    lines, row, column = [""], 0, 0
    for text, argument, letter, moved in SENT.findall(sent):
        if text:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
        elif letter == "A":
            row = max(0, row - int(argument or 1))
        elif letter == "K":
            lines[row] = ""
        elif moved == "\r":
            column = 0
        elif moved == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        else:
            assert letter in "mhl", f"{argument}{letter}"
    return [line.rstrip() for line in lines]


def test_the_emulated_terminal_does_what_a_terminal_does() -> None:
    assert screen("ab\r\ncd\x1b[1A\rx\x1b[31my\x1b[0m\r\n\x1b[2Kz") == ["xy", "z"]
    assert screen("above\r\nbelow\r\x1b[2Kline\r\nbelow") == ["above", "line", "below"]


EPOCH = (
    r"epoch +\d+/3  loss [\d.]+  val_accuracy [\d.]+  [\d.]+ s( \(\d+% waiting for data\))?  [\d.]+ M MACs  \d+ params"
)


def test_on_a_terminal_a_line_stays_below_what_trials_print(fork_server: ForkServer, tmp_path: Path) -> None:
    """The real command: whatever is printed meanwhile is whole in the end, and of the line itself nothing is left."""
    sweep = ["-m", "hydra/sweeper=morphtrain", "hydra.sweep.dir=sweep", "tracking=none", "epochs=3"]
    sweep += ["data=synthetic", "data.train_samples=2048", "data.image_size=8", "model.width=8,12"]
    sweep += ["hydra/sweeper/sampler=grid", "hydra.sweeper.baseline=null", "timing.reference=0"]
    result = fork_server.run([ON_TERMINAL, "sent", "80", *sweep], tmp_path)
    sent = (tmp_path / "sent").read_bytes().decode()
    assert result.returncode == 0, sent + result.stderr
    assert "sweep: 0 of 2 trials" in sent
    assert "sweep: 1 of 2 trials; best so far: trial 0, train_seconds " in sent
    shown = screen(sent)
    epochs = [line for line in shown if "loss" in line]
    assert len(epochs) == 6
    assert all(re.fullmatch(EPOCH, line) for line in epochs), "\n".join(epochs)
    use = [line for line in shown if line.startswith("use it:")]
    assert len(use) == 2 and all(len(line) > 80 and line.endswith("last.pt'))\"") for line in use), "left whole"
    rows = [line for line in shown if set(line) & set("┃│┏┡└")]
    assert len(rows) > 10, "closing tables"
    ends = {(line[0], line[-1]) for line in rows}
    assert ends <= {("┃", "┃"), ("│", "│"), ("┏", "┓"), ("┡", "┩"), ("└", "┘")}, rows
    assert not [line for line in shown if line.startswith("sweep:") or re.match(r"epoch \d/3 [━╸╺]", line)]
    assert [line[:14] for line in shown if re.match(r" +\d/2 ", line)] == ["   1/2 trial 0", "   2/2 trial 1"]
