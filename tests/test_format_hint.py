"""What a run is told about 16 bits at its start: only what its own network's steps show, and only where it is cheap."""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_resume import assert_same
from torch import nn

import morphtrain
from morphtrain.cost.step import training_step
from morphtrain.cost.stopwatch import timed
from morphtrain.morph import format_of_model
from morphtrain.precision import auto as precisions
from morphtrain.state import Run
from morphtrain.trainer import auto, begin_epoch, build_run, format_hint, start, train, train_epoch

DENSE = [override for override in SMALL if not override.startswith("prune")]
OFFER, WARNING = "a training step would take", "a training step of this network takes"
LONG, SHORT = "epochs=150", "epochs=149"  # 16 steps each

Steps = Counter[tuple[bool, bool]]  # in bfloat16, in channels_last


def run_of(*overrides: str) -> Run:
    keys = {override.split("=")[0] for override in overrides}
    own = [override for override in DENSE if override.split("=")[0] not in keys]
    return build_run(morphtrain.compose(*own, "tracking=none", "device=cpu", *overrides))


@pytest.fixture
def fast_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose usual convolutions are fast in bfloat16, whatever those of a network are."""
    monkeypatch.setattr(precisions, "slowdown", lambda device, dtype: 0.3)


def steps_that_take(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[bool, bool], float]) -> Steps:
    """Steps that only sleep; counted."""
    taken: Steps = Counter()

    def step(model, optimizer, images, labels, dtype) -> None:  # type: ignore[no-untyped-def]
        kind = dtype is torch.bfloat16, format_of_model(model) is torch.channels_last
        taken[kind] += 1
        time.sleep(seconds[kind])

    monkeypatch.setattr(format_hint, "training_step", step)
    return taken


def said(run: Run, caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    with caplog.at_level(logging.INFO):
        start(run, hint=True)
    return [record for record in caplog.records if record.name == format_hint.log.name]


PLAIN, LAST, HALF, LAST_HALF = (False, False), (False, True), (True, False), (True, True)


@pytest.mark.parametrize(
    ("half", "last_half", "overrides", "offer"),
    [
        (0.01, 0.001, [], "precision=bf16 memory_format=channels_last: "),
        (0.003, 0.008, [], "precision=bf16: "),
        (0.02, 0.002, ["memory_format=channels_last"], "precision=bf16: "),
    ],
)
def test_what_is_clearly_faster_is_one_line_that_says_how_to_get_it(
    half: float,
    last_half: float,
    overrides: list[str],
    offer: str,
    fast_convolution: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    taken = steps_that_take(monkeypatch, {PLAIN: 0.02, LAST: 0.02, HALF: half, LAST_HALF: last_half})
    run = run_of(LONG, *overrides)
    (line,) = said(run, caplog)
    assert line.getMessage().startswith(f"{offer}{OFFER} 0.") and line.levelno == logging.INFO
    keys = [word.partition("=")[0] for word in offer.rstrip(": ").split()]
    assert f"; {' '.join(f'{key}=auto' for key in keys)} chooses by time alone" in line.getMessage()
    assert set(taken.values()) == {1 + format_hint.ROUNDS}
    assert sum(taken.values()) <= format_hint.SHARE * 2400
    assert run.clock.seconds["setup_seconds"] >= 4 * (0.02 + last_half)


def test_a_network_whose_own_steps_are_slow_is_not_told_otherwise(
    fast_convolution: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken = steps_that_take(monkeypatch, {PLAIN: 0.01, HALF: 0.1, LAST_HALF: 0.0125})
    assert said(run_of(LONG), caplog) == []
    assert taken == {PLAIN: 4, HALF: 1, LAST_HALF: 4}, "nothing more is spent on what is hopeless"


def test_a_run_in_16_bits_that_is_slower_is_warned(
    fast_convolution: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps_that_take(monkeypatch, {PLAIN: 0.002, HALF: 0.02})
    (line,) = said(run_of(LONG, "precision=bf16"), caplog)
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith(f"precision=bf16: {WARNING} ")
    caplog.clear()
    steps_that_take(monkeypatch, {PLAIN: 0.02, HALF: 0.02})
    assert said(run_of(LONG, "precision=bf16"), caplog) == []


@pytest.mark.parametrize(
    "overrides",
    [
        [SHORT],
        [LONG, "precision=auto"],
        [LONG, "precision=dfp16"],
        [LONG, "compile=default"],
        [LONG, "batch_policy=fill_memory", "batch_policy.budget=1GiB"],
    ],
)
def test_nothing_is_timed_where_it_would_cost_or_say_nothing(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "step_seconds", lambda run: {auto.Choice("contiguous", "o0"): 1.0})
    taken = steps_that_take(monkeypatch, {})
    assert said(run_of(*overrides), caplog) == [] and not taken


def test_what_a_cpu_emulates_is_not_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(precisions, "slowdown", lambda device, dtype: 50.0)
    taken = steps_that_take(monkeypatch, {})
    assert said(run_of(LONG), caplog) == [] and not taken


def test_a_resumed_run_is_not_told_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    taken = steps_that_take(monkeypatch, {})
    run = run_of(LONG)
    run.epoch, run.batch_size = 1, 16
    assert said(run, caplog) == [] and not taken


def test_a_trial_that_fails_costs_the_hint_alone(
    fast_convolution: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(format_hint, "training_step", fails)
    (line,) = said(run_of(LONG), caplog)
    assert line.getMessage() == "what 16 bits would do to a training step is not known: no such kernel"


def test_the_run_itself_is_as_without_a_hint(fast_convolution: None) -> None:
    dropout = ("model=alexnet", "model.dropout=0.5", "model.batch_norm=true", "data.image_size=16")
    without_width = [override for override in DENSE if not override.startswith("model.")]
    runs = []
    for hint in (False, True):
        composed = [*without_width, "tracking=none", "device=cpu", LONG, *dropout]
        run = build_run(morphtrain.compose(*(o for o in composed if o != "data.image_size=8" and o != "epochs=6")))
        before = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict(), torch.get_rng_state()])
        start(run, hint=hint)
        assert_same([run.model.state_dict(), run.optimizer.state_dict(), torch.get_rng_state()], before)
        begin_epoch(run)
        train_epoch(run)
        runs.append([run.model.state_dict(), run.optimizer.state_dict(), torch.get_rng_state()])
    assert_same(*runs)


@pytest.mark.parametrize(("study", "told"), [("none", True), ("multirun/a", False)])
def test_the_runs_of_a_sweep_or_an_experiment_are_not_told(
    study: str, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Run] = []
    monkeypatch.setattr(format_hint, "say", asked.append)
    train(morphtrain.compose(*DENSE, "tracking=none", "device=cpu", "epochs=1"), tmp_path, {"study": study})
    assert (len(asked) == 1) == told


class Dilated(nn.Module):
    """A network of dilated and grouped convolutions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        grouped = nn.Conv2d(32, 32, 3, padding=4, dilation=4, groups=8)
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3, padding=2, dilation=2), nn.ReLU(), grouped, nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.slow
def test_dilated_convolutions_are_told_what_they_take(caplog: pytest.LogCaptureFixture) -> None:
    """By steps that the test times itself: no offer of what is slower, and a warning for who has it."""
    network = ("model=custom", "model._target_=test_format_hint.Dilated", "data.image_size=32")
    own = [o for o in DENSE if not o.startswith(("model.", "data.image_size", "epochs"))]
    runs = {
        name: build_run(morphtrain.compose(*own, *network, "tracking=none", "device=cpu", LONG, f"precision={name}"))
        for name in ("o0", "bf16")
    }
    seconds = {}
    for name, dtype in (("o0", None), ("bf16", torch.bfloat16)):
        step = partial(training_step, *auto.twin(runs["o0"], "contiguous"), dtype)
        times = [timed(step, runs["o0"].device) for _ in range(8)]
        seconds[name] = sorted(times)[3]
    ratio = seconds["bf16"] / seconds["o0"]
    print(f"a step of dilated and grouped convolutions in bf16 takes {ratio:.2f} of its time in 32 bits")
    offered = [line.getMessage() for line in said(runs["o0"], caplog) if OFFER in line.getMessage()]
    caplog.clear()
    warned = [line.getMessage() for line in said(runs["bf16"], caplog) if WARNING in line.getMessage()]
    assert ratio < 1.1 or not any(line.startswith(f"precision=bf16: {OFFER}") for line in offered)
    assert ratio > 1 or not warned
