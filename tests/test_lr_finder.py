"""The learning rate range test: its rates, its losses, what it suggests, and that it leaves nothing else behind."""

from __future__ import annotations

import csv
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from fork_server import ForkServer

import morphtrain
from morphtrain import lr_finder, schema
from morphtrain.errors import UserError
from morphtrain.trainer import auto, new_run, start
from morphtrain.trainer.lr_range import Step, range_test, suggestion

PLAIN = [o for o in SMALL if not o.startswith(("prune", "epochs"))]


def steps_of(*overrides: str, lowest: float = 1e-4, highest: float = 100.0, steps: int = 60) -> list[Step]:
    run = new_run(morphtrain.compose(*PLAIN, *overrides), torch.device("cpu"))
    start(run)
    return list(range_test(run, lowest, highest, steps))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("optimizer=adamw", "precision=o1"),
        pytest.param(("optimizer=lars", "norm=ghost"), marks=pytest.mark.slow),
        ("precision=o1", "precision.dtype=float16"),
        pytest.param(("norm=weight", "clip_norm=1"), marks=pytest.mark.slow),
        pytest.param(("optimizer=isgd", "schedule=milestones"), marks=pytest.mark.slow),
        ("prune=prunetrain", "batch_policy=adabatch", "batch_policy.every=1"),
        ("data.infobatch=0.5",),
    ],
)
def test_the_rates_rise_exponentially(options: tuple[str, ...]) -> None:
    found = steps_of(*options)
    assert len(found) >= 20
    for number, step in enumerate(found):
        assert step.learning_rate == pytest.approx(1e-4 * (1e6) ** (number / 59), rel=1e-6)
    average = 0.0
    for number, step in enumerate(found, 1):
        average = 0.95 * average + 0.05 * step.loss
        assert step.smoothed == pytest.approx(average / (1 - 0.95**number), rel=1e-9)


def options_of(group: str) -> list[str]:
    return [option for option in schema.OPTIONS[group] if option != "custom"]


@pytest.mark.parametrize(
    ("precision", "optimizer", "norm"),
    list(  # of precisions there are most
        zip(options_of("precision"), itertools.cycle(options_of("optimizer")), itertools.cycle(options_of("norm")))
    ),
)
def test_it_takes_every_precision_optimizer_and_norm(
    precision: str, optimizer: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "MOST_ROUNDS", auto.LEAST_ROUNDS)
    options = [f"precision={precision}", f"optimizer={optimizer}", f"norm={norm}"]
    options += ["optimizer.eps=1e-5"] * (optimizer == "adamw")  # which 16 bits have
    found = steps_of(*options, "model.blocks=1", "model.width=4", lowest=1e-5, highest=1e-3, steps=20)
    assert [step.learning_rate for step in found] == pytest.approx([1e-5 * 100 ** (n / 19) for n in range(20)])
    assert all(0 < step.loss < 10 for step in found)


def test_every_option_takes_part() -> None:
    assert len(options_of("precision")) >= max(len(options_of("optimizer")), len(options_of("norm")))


def test_a_rate_of_zero_is_refused_in_a_line() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr=0\.0: must be above 0"):
        steps_of("optimizer.lr=0")
    with pytest.raises(UserError, match="the learning rate of its first group is 0, and no factor") as error:
        steps_of("optimizer=custom", "optimizer._target_=torch.optim.SGD", "+optimizer.lr=0.0")
    assert str(error.value).startswith("optimizer=torch.optim.SGD: ") and "\n" not in str(error.value)


def test_the_first_losses_are_those_of_a_run() -> None:
    """At a rate that changes nothing: the losses of the first batches, an independent forward pass each."""
    run = new_run(morphtrain.compose(*PLAIN), torch.device("cpu"))
    start(run)
    run.epoch = 1
    run.model.train()
    with torch.no_grad():
        wanted = [run.criterion(run.model(x), y).item() for x, y in run.data.train_batches(16, run.generator(1))]
    found = [step.loss for step in steps_of(lowest=1e-12, highest=2e-12, steps=20)]
    assert found[:16] == pytest.approx(wanted, rel=1e-4)


def test_it_ends_where_the_loss_has_risen() -> None:
    found = steps_of(highest=1e6, steps=100)
    assert len(found) < 100
    assert all(math.isfinite(step.smoothed) for step in found)


def curve(losses: list[float]) -> list[Step]:
    return [Step(10.0 ** (number - 20), loss, loss) for number, loss in enumerate(losses)]


def test_what_is_suggested() -> None:
    found = curve([*(2 - 0.1 * n for n in range(15)), *(0.6 + 0.1 * n for n in range(1, 10))])
    assert suggestion(found) == pytest.approx(10.0 ** (14 - 20) / 10)
    for losses, said in (
        ([1.0 + n for n in range(30)], "--from 1e-20: the loss only rises"),
        ([30.0 - n for n in range(30)], "--to 1e[+]09: the loss still falls"),
        ([1.0] * 5, "--from: the loss was no number after 5 steps"),
    ):
        with pytest.raises(UserError, match=said):
            suggestion(curve(losses))


def test_the_command_leaves_a_picture_and_a_table(tmp_path: Path, fork_server: ForkServer) -> None:
    words = [*PLAIN, "--steps", "80", "--to", "100", "--output", "found"]
    result = fork_server.run(["-m", "morphtrain.lr_finder", *words], tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["lr_finder.csv", "lr_finder.png"]
    assert (tmp_path / "found" / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "found" / "lr_finder.csv").open()))
    lowest = min(rows, key=lambda row: float(row["smoothed"]))
    assert f"optimizer.lr={float(lowest['learning_rate']) / 10:.2g}" in result.stdout
    assert list(rows[0]) == ["learning_rate", "loss", "smoothed"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "5"], "--steps=5: must be 20 or more"),
        (["--from", "1", "--to", "0.1"], "--from=1.0: must be above 0 and below --to 0.1"),
        (["resume=auto"], "resume: has no effect on a range test; leave it out"),
        (["schedule.warmup_epochs=1"], "schedule.warmup_epochs: has no effect on a range test; leave it out"),
        (["stop_at=0.9"], "stop_at: has no effect on a range test; leave it out"),
        (["ema=1"], "ema: has no effect on a range test; leave it out"),
        (["--output", __file__], f"--output={__file__}: must be a directory, new or not"),
    ],
)
def test_mistakes_are_answered_in_a_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lr_finder", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it to 1
    with pytest.raises(SystemExit) as ended:
        lr_finder.main()
    assert ended.value.code == said
    assert not list(tmp_path.iterdir())


def test_help_waits_for_no_torch() -> None:
    assert lr_finder.parse(["model=vgg8", "--to", "2"]).highest == 2
    line = [sys.executable, "-X", "importtime", "-m", "morphtrain.lr_finder", "--help"]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "suggest" in result.stdout or "rates" in result.stdout
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)
