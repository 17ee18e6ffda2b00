"""memory_format=auto and precision=auto: what is clearly faster is taken, and all goes on as if it had been typed."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from test_memory_format import stop_after
from test_resume import assert_same
from torch import nn
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.morph import format_of_model
from morphtrain.precision import Precision, autocast
from morphtrain.precision import auto as precisions
from morphtrain.state import Run
from morphtrain.tracking.none import NoTracker
from morphtrain.trainer import auto, train
from morphtrain.trainer.auto import Choice
from morphtrain.trainer.build import build_run
from morphtrain.trainer.checkpoint import Checkpoint
from morphtrain.trainer.epoch import begin_epoch, start
from morphtrain.trainer.share import training_shares

CPU = torch.device("cpu")
BOTH = ("memory_format=auto", "precision=auto")
PLAIN, LAST, HALF, LAST_HALF = (Choice(m, p) for p in ("o0", "bf16") for m in ("contiguous", "channels_last"))
SECONDS = {PLAIN: 1.0, LAST: 0.95, HALF: 0.7, LAST_HALF: 0.5}
TYPED = ("memory_format=channels_last", "precision=bf16")
UNPRUNED = [override for override in SMALL if not override.startswith("prune")]


def config_of(*overrides: str) -> schema.Config:
    return morphtrain.compose(*UNPRUNED, "tracking=none", "device=cpu", "epochs=2", *overrides)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs whose steps were timed, which always gives SECONDS."""
    runs: list[Run] = []

    def step_seconds(run: Run) -> dict[Choice, float]:
        runs.append(run)
        return SECONDS

    monkeypatch.setattr(auto, "step_seconds", step_seconds)
    return runs


def trained(*overrides: str) -> Run:
    return trained_to_the_end(config_of(*overrides))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_a_clear_win_is_taken_and_noise_leaves_the_plainest(seconds: list[float]) -> None:
    choices = {Choice("contiguous", str(number)): spent for number, spent in enumerate(seconds)}
    (_, number), ratio = auto.clearly_fastest(choices)
    taken = seconds[int(number)]
    assert ratio == taken / seconds[0]
    assert taken <= min(seconds) / auto.CLEARLY
    assert all(taken < auto.CLEARLY * plainer for plainer in seconds[: int(number)])


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [(BOTH, {"memory_format": "channels_last", "precision": "bf16"}), (BOTH[1:], {"precision": "bf16"})],
)
def test_it_trains_as_what_was_chosen(keys: tuple[str, ...], chosen: dict[str, str], measured: list) -> None:
    run = trained(*keys)
    typed = trained(*(f"{key}={value}" for key, value in chosen.items()))
    assert run.chosen == chosen and len(measured) == 1
    assert format_of_model(run.model) is format_of_model(typed.model)
    assert_same(run.model.state_dict(), typed.model.state_dict())
    assert_same(run.optimizer.state_dict(), typed.optimizer.state_dict())
    assert run.history[-1]["precision_bits"] == 16
    assert run.history[-1].get("channels_last") == (1.0 if "memory_format" in chosen else None)
    assert "precision_bits" not in typed.history[-1]


def test_infobatch_chooses_from_the_data_in_the_format_that_was_chosen(measured: list) -> None:
    run = build_run(config_of("memory_format=auto", "data.infobatch=0.5", "epochs=4"))
    start(run)
    begin_epoch(run)
    images = next(training_shares(run)).images
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_measured_where_nothing_is_auto(measured: list) -> None:
    assert trained("epochs=1").chosen == {}
    assert measured == []


def test_the_choice_is_one_line_and_on_the_clock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "step_seconds", lambda run: time.sleep(0.2) or SECONDS)
    with caplog.at_level(logging.INFO):
        run = trained(*BOTH, "epochs=1")
    chosen = "memory_format=auto precision=auto: memory_format=channels_last precision=bf16; "
    line = f"{chosen}a step takes 0.50 of its time with contiguous o0 (measured in 0.2"
    assert sum(message.startswith(line) for message in caplog.messages) == 1
    assert run.history[0]["setup_seconds"] >= 0.2
    assert run.history[0]["train_seconds"] >= run.history[0]["epoch_seconds"] + 0.2


def test_steps_of_copies_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run, its data and random numbers stay, whatever the copies do."""
    monkeypatch.setattr(precisions, "SLOW", 1e9)
    monkeypatch.setattr(auto, "SECONDS", 0.0)
    small = [o for o in UNPRUNED if not o.startswith("model.")]
    dropout = ("model=alexnet", "model.dropout=0.5", "model.batch_norm=true", "data.image_size=16")
    run = build_run(morphtrain.compose(*small, "tracking=none", "device=cpu", *BOTH, *dropout, "optimizer=adamw"))
    before = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict(), torch.get_rng_state()])
    seconds = auto.step_seconds(run)
    assert list(seconds) == [PLAIN, LAST, HALF, LAST_HALF]
    assert all(0 < spent < 5 for spent in seconds.values())
    assert_same([run.model.state_dict(), run.optimizer.state_dict(), torch.get_rng_state()], before)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_what_takes_its_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that takes 20 ms more in one of the four."""
    real = auto.training_step

    def step(model, optimizer, images, labels, precision) -> None:  # type: ignore[no-untyped-def]
        slow = precision.dtype is not torch.bfloat16 or format_of_model(model) is torch.contiguous_format
        time.sleep(0.02 if slow else 0)
        real(model, optimizer, images, labels, None)

    monkeypatch.setattr(auto, "training_step", step)
    monkeypatch.setattr(precisions, "SLOW", 1e9)
    run = build_run(config_of(*BOTH, "model.width=4", "batch_policy.batch_size=4"))
    start(run)
    assert run.chosen == {"memory_format": "channels_last", "precision": "bf16"}


def test_what_a_cpu_emulates_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "slowdown", lambda device, dtype: 50.0)
    assert list(precisions.worth_trying(CPU)) == ["o0"]
    monkeypatch.setattr(precisions, "slowdown", lambda device, dtype: 0.9)
    assert list(precisions.worth_trying(CPU)) == ["o0", "bf16"]


def test_what_a_format_takes_here_is_measured_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[torch.dtype] = []
    monkeypatch.setattr(autocast, "_convolution_seconds", lambda dtype: timed.append(dtype) or 2.0)  # type: ignore[func-returns-value]
    autocast.slowdown.cache_clear()
    assert [autocast.slowdown(CPU, torch.float16) for _ in range(3)] == [1.0, 1.0, 1.0]
    assert timed == [torch.float16, torch.float32]
    autocast.slowdown.cache_clear()


def test_processes_take_the_first_ones_choice(measured: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "decide", lambda make: {PLAIN: 1.0, LAST: 0.8})  # which calls nothing in another process
    run = build_run(config_of(*BOTH))
    start(run)
    assert run.chosen == {"memory_format": "channels_last", "precision": "o0"}
    assert run.precision.dtype is None and format_of_model(run.model) is torch.channels_last


def test_a_resumed_run_keeps_it_and_a_file_knows_it(measured: list, tmp_path: Path) -> None:
    ends = []
    for name, stops in (("whole", [2]), ("parts", [1, 2])):
        (tmp_path / name).mkdir()
        for number, last in enumerate(stops):
            stop_after(last, config_of(*BOTH, f"resume={'auto' if number else 'never'}"), tmp_path / name)
        ends.append(torch.load(tmp_path / name / "last.pt", weights_only=True))
    assert len(measured) == 2
    assert_same(ends[1]["model"], ends[0]["model"])
    assert_same(ends[1]["optimizer"], ends[0]["optimizer"])
    assert format_of_model(morphtrain.load(tmp_path / "parts" / "last.pt")) is torch.channels_last
    environment = json.loads((tmp_path / "parts" / "environment.json").read_text())
    assert (environment["memory_format"], environment["precision"]) == ("channels_last", "bf16")


def test_what_config_key_chosen_says_is_taken_and_measured_all_the_same(
    measured: list, caplog: pytest.LogCaptureFixture
) -> None:
    """So the first of the runs that share a choice does not pay for all of them."""
    with caplog.at_level(logging.INFO):
        run = trained(*BOTH, "chosen={memory_format: contiguous, precision: bf16}")
    typed = trained("precision=bf16")
    assert run.chosen == {"memory_format": "contiguous", "precision": "bf16"}
    assert_same(run.model.state_dict(), typed.model.state_dict())
    assert len(measured) == 1
    said = "memory_format=contiguous precision=bf16 instead: config key chosen says so"
    assert caplog.messages.count(said) == 1
    assert (run.history[-1]["precision_bits"], run.history[-1]["channels_last"]) == (16, 0)


def test_a_resumed_run_keeps_its_choice_whatever_it_is_told(measured: list, tmp_path: Path) -> None:
    """A run that began before another had chosen for it."""
    stop_after(1, config_of(*BOTH), tmp_path)
    config = config_of(*BOTH, "chosen={memory_format: contiguous, precision: o0}", "resume=auto")
    assert Checkpoint(tmp_path / "last.pt").restore(config).chosen == {
        "memory_format": "channels_last",
        "precision": "bf16",
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((), "chosen={'precision': 'bf16'}: must be null: no key is auto"),
        (BOTH, "chosen={'precision': 'bf16'}: must be null, or a value of each key that is auto: {memory_format: ...,"),
        (("memory_format=auto", "chosen=fast"), "chosen=fast: must be keys with values, as {key: value}, or null"),
    ],
)
def test_a_choice_of_what_is_not_auto_is_refused(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config_of("chosen={precision: bf16}", *keys)
    assert str(refused.value).startswith(message)


def test_a_choice_that_the_device_does_not_have_is_named(measured: list) -> None:
    run = build_run(config_of("precision=auto", "chosen={precision: o9}"))
    with pytest.raises(UserError, match="precision=o9: must be one of o0, bf16"):
        start(run)


def test_float16_is_no_choice_where_a_method_takes_steps(measured: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that another run has made, as in an experiment."""
    scaled = Precision(torch.device("cpu"), torch.float16)
    monkeypatch.setattr(precisions, "candidates", lambda device: {"o0": Precision(device), "o1": scaled})
    run = build_run(config_of("precision=auto", "chosen={precision: o1}", "optimizer=isgd"))
    with pytest.raises(UserError, match=r"^precision=o1: must be one of o0$"):
        start(run)


def test_trackers_are_told_what_ran(measured: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    monkeypatch.setattr(NoTracker, "start", lambda self, params, tags, *rest: told.update(tags))
    train(config_of(*BOTH, "epochs=1"), tmp_path, {"precision": "auto"})
    assert (told["precision"], told["memory_format"]) == ("bf16", "channels_last")


def test_a_network_that_a_precision_cannot_train_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = auto.training_step

    def step(model, optimizer, images, labels, precision) -> None:  # type: ignore[no-untyped-def]
        if precision.dtype is torch.bfloat16:
            raise RuntimeError('"fancy" not implemented for BFloat16')
        real(model, optimizer, images, labels, precision)

    monkeypatch.setattr(auto, "training_step", step)
    monkeypatch.setattr(precisions, "SLOW", 1e9)
    run = build_run(config_of("precision=auto"))
    with pytest.raises(UserError, match=r'^precision=auto: the network does not train in bf16: "fancy" not'):
        start(run)


class Flat(nn.Module):
    """A network whose `view` takes contiguous activations only."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6 * 6 * 6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.head(x.view(len(x), -1))


def test_a_format_that_the_network_does_not_train_in_is_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    own = [o for o in UNPRUNED if not o.startswith("model")]
    own += ["model=custom", "model._target_=test_auto.Flat", "memory_format=auto", "tracking=none", "device=cpu"]
    run = build_run(morphtrain.compose(*own))
    with caplog.at_level(logging.INFO):
        start(run)
    assert run.chosen == {"memory_format": "contiguous"}
    wanted = "memory_format=auto: the network does not train with memory_format=channels_last: view size is not"
    assert sum(message.startswith(wanted) for message in caplog.messages) == 1


def test_the_largest_batch_needs_a_choice() -> None:
    with initialize_config_dir(str(schema.CONF)):
        composed = compose("maxbatch", overrides=["precision=auto", "budget=1GiB"])
    with pytest.raises(UserError, match="precision=auto: must be another option"):
        schema.parse_max_batch(composed)
