"""A run that goes on with more epochs than it was planned for, and one that ends early, at an accuracy."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill
from test_resume import assert_same, ends

import morphtrain
from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.trainer import begin_epoch, checkpoint, finish_epoch, longer, new_run, start, train, train_epoch

PLAIN = [o for o in SMALL if not o.startswith(("prune", "epochs"))]
QUIET = [*PLAIN, "tracking=none", "timing.reference=0"]
PLANNED = 3


def go(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """A run whose checkpoints are in this directory; returns what is stored of its end."""
    run_dir.mkdir(exist_ok=True)
    config = morphtrain.compose(*QUIET, *overrides)
    last = run_dir / "last.pt"
    run = checkpoint.Checkpoint(last).restore(config) if config.resume == "auto" else new_run(config)
    start(run)
    while not run.ended:
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run)
        checkpoint.save(run, run_dir, None)
    return torch.load(last, weights_only=True)


def rates(run_dir: Path) -> list[float]:
    return [record["learning_rate"] for record in checkpoint.Checkpoint(run_dir / "last.pt").facts["history"]]


def continued(run_dir: Path, mode: str, *overrides: str, epochs: int = 2 * PLANNED) -> dict[str, Any]:
    go(run_dir, f"epochs={PLANNED}", *overrides)
    return go(run_dir, f"epochs={epochs}", "resume=auto", f"resume_schedule={mode}", *overrides)


@pytest.mark.parametrize("mode", ["stretch", "append"])
def test_a_constant_rate_gives_the_long_run(mode: str, tmp_path: Path) -> None:
    """Bit for bit: nothing but the schedule knows how long the run was to be."""
    both = continued(tmp_path / "on", mode, "schedule=constant"), go(tmp_path / "once", "epochs=6", "schedule=constant")
    assert_same(both[0]["model"], both[1]["model"])
    assert_same(both[0]["optimizer"], both[1]["optimizer"])
    assert len(rates(tmp_path / "on")) == 6


@pytest.mark.parametrize("schedule", ["linear", pytest.param("milestones", marks=pytest.mark.slow)])
def test_the_rates_of_the_added_epochs(schedule: str, tmp_path: Path) -> None:
    """Stretched, those of a run of that length; appended, those of the first run once more."""
    options = f"schedule={schedule}", "schedule.warmup_epochs=1"
    go(tmp_path / "whole", "epochs=6", *options)
    continued(tmp_path / "stretched", "stretch", *options)
    continued(tmp_path / "appended", "append", *options)
    short = rates(tmp_path / "appended")[:PLANNED]
    assert rates(tmp_path / "stretched") == [*short, *rates(tmp_path / "whole")[PLANNED:]]
    assert rates(tmp_path / "appended")[PLANNED:] == pytest.approx(short, rel=1e-6)
    assert max(short) > 2 * min(short)


def test_cycles_of_several_lengths() -> None:
    """An independent formula of the cosine in each cycle."""
    config = morphtrain.compose("epochs=10", "schedule.warmup_epochs=0")
    factor = longer.schedule(config, [2, 7])
    for first, last in ((0, 2), (2, 7), (7, 10)):
        for share in (0.0, 0.25, 0.9):
            done = first + share * (last - first)
            assert factor(done) == pytest.approx(0.5 * (1 + math.cos(math.pi * share)), abs=1e-12)


@pytest.mark.parametrize("mode", ["append", pytest.param("stretch", marks=pytest.mark.slow)])
def test_killed_in_the_added_epochs(mode: str, tmp_path: Path, command: Command, kill: Kill) -> None:
    pruned = [*QUIET, "prune=prunetrain", "prune.interval=2", "prune.start_epoch=2", "prune.lasso_ratio=4"]
    more = ["epochs=5", f"resume_schedule={mode}", "resume=auto"]
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        train(morphtrain.compose(*pruned, "epochs=2"), tmp_path / name, {})
    stamps(tmp_path / "once", tmp_path / "twice")
    assert command(*pruned, *more, "hydra.run.dir=once").returncode == 0
    kill("rename:3", *pruned, *more, "hydra.run.dir=twice")
    assert not (tmp_path / "twice" / "run.png").exists(), "it says that a run has ended"
    assert command(*pruned, *more, "hydra.run.dir=twice").returncode == 0
    assert_same(ends(tmp_path / "once"), ends(tmp_path / "twice"))
    assert (tmp_path / "twice" / "run.png").exists()


def stamps(*directories: Path) -> None:
    """Both runs are as one, before anything is compared."""
    assert_same(*(ends(directory) for directory in directories))


def test_twice_longer(tmp_path: Path) -> None:
    continued(tmp_path, "append", epochs=4)
    stored = go(tmp_path, "epochs=6", "resume=auto", "resume_schedule=append")
    assert json.loads(stored["facts"])["cycles"] == [3, 4]
    go(tmp_path, "epochs=8", "resume=auto", "resume_schedule=stretch")
    assert json.loads(torch.load(tmp_path / "last.pt", weights_only=True)["facts"])["cycles"] == [3, 4]
    assert len(rates(tmp_path)) == 8


def test_more_epochs_without_the_key_are_refused(tmp_path: Path) -> None:
    go(tmp_path, "epochs=2")
    with pytest.raises(UserError, match=r"epochs=4: .* was written with epochs=2; .*resume_schedule=stretch or"):
        go(tmp_path, "epochs=4", "resume=auto")
    with pytest.raises(UserError, match="epochs=1: "):
        go(tmp_path, "epochs=1", "resume=auto", "resume_schedule=append")
    with pytest.raises(UserError, match=r"optimizer\.lr=0\.2: .* was written with optimizer\.lr=0\.1"):
        go(tmp_path, "epochs=4", "resume=auto", "resume_schedule=append", "optimizer.lr=0.2")
    with pytest.raises(UserError, match="resume_schedule=more: must be stretch or append"):
        morphtrain.compose("resume_schedule=more")


@pytest.mark.parametrize(
    ("key", "mode", "done", "works"),
    [
        (("data.progressive=0.5",), "stretch", 60, False),  # small again until epoch 90
        (("data.progressive=0.5",), "append", 60, False),
        (("data.progressive=0.5",), "stretch", 20, True),  # still small, and for longer
        (("data.progressive=0.5",), "append", 20, False),
        (("data.progressive=0.5", "data.progressive_until=0.25"), "append", 60, True),  # has ended in any case
        (("data.infobatch=0.5",), "stretch", 60, False),
        (("prune=early", "prune.by=0.5"), "stretch", 40, False),  # has cut after epoch 30, would again after 60
        (("prune=early", "prune.by=0.5"), "stretch", 60, True),
        (("prune=early", "prune.by=0.5"), "stretch", 10, True),
        (("prune=early", "prune.by=0.5"), "append", 10, False),
        ((), "append", 60, True),
    ],
)
def test_what_ends_at_a_share_of_the_epochs_does_not_come_again(
    key: tuple[str, ...], mode: str, done: int, works: bool
) -> None:
    config = morphtrain.compose("epochs=120", f"resume_schedule={mode}", *key)
    if works:
        longer.cycles(config, {"epochs": 60}, [], done)
        return
    with pytest.raises(UserError, match=r"(data\.\w+_until|prune\.by)=.*epochs=60.*epochs=120"):
        longer.cycles(config, {"epochs": 60}, [], done)


def test_checkpoints_of_before_the_key(tmp_path: Path) -> None:
    go(tmp_path, "epochs=2")
    found = checkpoint.Checkpoint(tmp_path / "last.pt")
    for name in ("resume_schedule", "stop_at"):
        del found.facts["config"][name]
    del found.facts["cycles"]
    run = found.restore(morphtrain.compose(*QUIET, "epochs=4", "resume_schedule=append"))
    assert run.cycles == [2] and run.epoch == 2


# -- stop_at --------------------------------------------------------------------------------------------------------


def test_a_run_ends_at_the_accuracy_that_was_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: Command
) -> None:
    go(tmp_path / "whole", "epochs=6")
    stored = checkpoint.Checkpoint(tmp_path / "whole" / "last.pt").facts["history"]
    accuracies = [record["val_accuracy"] for record in stored]
    target = max(accuracies[:3])
    first = next(number for number, accuracy in enumerate(accuracies, 1) if accuracy >= target)
    result = command(*QUIET, "epochs=6", f"stop_at={target}", "hydra.run.dir=early", "objective=[stopped_early]")
    assert result.returncode == 0, result.stderr
    assert f"stop_at={target:g}: reached after epoch {first} of 6" in result.stdout
    records = read_records(tmp_path / "early")
    assert [record["val_accuracy"] for record in records] == accuracies[:first]
    assert [record["stopped_early"] for record in records] == [0.0] * (first - 1) + [1.0]
    assert (tmp_path / "early" / "run.png").exists()
    again = go(tmp_path / "early", "epochs=6", f"stop_at={target}", "resume=auto")
    assert json.loads(again["facts"])["epoch"] == first, "it has ended"
    go(tmp_path / "early", "epochs=6", "resume=auto")
    both = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "early")]
    assert_same(*both)


def test_it_is_the_validation_images_that_decide(tmp_path: Path) -> None:
    """The test images are seen once, at the end, wherever that is."""
    tiny = ["data=digits", "model.width=4", "tracking=none", "timing.reference=0", "epochs=4", "seed=3"]
    tmp_path.joinpath("run").mkdir()
    train(morphtrain.compose(*tiny, "stop_at=0.2"), tmp_path / "run", {})
    records = read_records(tmp_path / "run")
    assert records[-1]["val_accuracy"] >= 0.2 > max([0.0, *(r["val_accuracy"] for r in records[:-1])])
    assert [("test_accuracy" in record) for record in records] == [False] * (len(records) - 1) + [True]


def test_a_run_that_was_accurate_enough_before_it_was_asked_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No epoch follows, and its records knew nothing of the key."""
    caplog.set_level(logging.INFO)
    train(morphtrain.compose(*QUIET, "epochs=1"), tmp_path, {})
    longer = ("epochs=3", "resume_schedule=stretch", "resume=auto", "stop_at=0.001")
    assert train(morphtrain.compose(*QUIET, *longer, "objective=[stopped_early]"), tmp_path, {}) == [1.0]
    assert "stop_at=0.001: reached after epoch 1 of 3" in caplog.text
    assert [record["stopped_early"] for record in read_records(tmp_path)] == [1.0]
    at_its_end = ("epochs=1", "resume=auto", "stop_at=0.001", "objective=[stopped_early]")
    assert train(morphtrain.compose(*QUIET, *at_its_end), tmp_path, {}) == [0.0], "all epochs were trained"
    train(morphtrain.compose(*QUIET, *longer[:3]), tmp_path, {})
    assert len(read_records(tmp_path)) == 3 and (tmp_path / "best.pt").exists()


def test_stop_at_is_an_accuracy() -> None:
    for wrong in ("0", "1.5", "-1"):
        with pytest.raises(UserError, match=r"stop_at=.*: must be a val_accuracy"):
            morphtrain.compose(f"stop_at={wrong}")
    assert "stopped_early" not in morphtrain.compose().recorded
    assert isinstance(morphtrain.compose("stop_at=0.9", "objective=[stopped_early]"), schema.Config)
