"""Killed at any moment and resumed, a run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill
from fork_server import ForkServer

import morphtrain
from morphtrain.trainer import train

TIMES = ("seconds", "timestamp", "samples_per_second", "peak_memory", "contended", "foreign_cpu")
EPOCHS = 8
RUN = (*SMALL, f"epochs={EPOCHS}", "hydra.run.dir=run", "resume=auto", "tracking.flush_seconds=0")
STARTED = [override for override in RUN if override != "resume=auto"]  # as a user would: nobody plans to be killed


def moments() -> list[str]:
    """Ten moments: each kind of event at a random occurrence, and random times, in seconds."""
    draw = random.Random(20)
    events = {
        "write": EPOCHS,
        "rename": 2 * EPOCHS - 1,
        "renamed": 2 * EPOCHS - 1,
        "morph": 20,
        "report": EPOCHS,
        "step": 16 * EPOCHS,
    }
    named = [f"{event}:{draw.randint(1, most)}" for event, most in events.items()]
    return [*named, f"morph:{draw.randint(1, 20)}", *(f"time:{draw.uniform(0.5, 3):.2f}" for _ in range(3))]


def contents(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint without what the clock says and which MLflow run it belongs to."""
    stored = torch.load(checkpoint, weights_only=True)
    facts = json.loads(stored.pop("facts"))
    facts.pop("tracking_id")
    facts["config"].pop("resume")
    facts["history"] = [{k: v for k, v in r.items() if not any(t in k for t in TIMES)} for r in facts["history"]]
    return {**stored, "facts": facts}


def ends(run_dir: Path) -> dict[str, Any]:
    """What a run leaves: the newest network and the best."""
    return {name: contents(run_dir / f"{name}.pt") for name in ("last", "best")}


def assert_same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, torch.Tensor):
        odd = a != a  # what is no number equals nothing; an overflow of 16 bits may have left some, the same in both
        assert torch.equal(odd, b != b) and torch.equal(a[~odd], b[~odd]), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b or (a != a and b != b), path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("uninterrupted")
    command = [sys.executable, "-m", "morphtrain.run", *RUN]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    stored = ends(directory / "run")
    history = stored["last"]["facts"]["history"]
    assert history[0]["params"] > history[EPOCHS // 2]["params"] > history[-1]["params"]
    return stored


@pytest.mark.parametrize("moment", moments())
def test_killed_and_resumed_it_ends_the_same(
    moment: str, uninterrupted: dict, tmp_path: Path, command: Command, kill: Kill, fork_server: ForkServer
) -> None:
    event, seconds = moment.split(":")
    if event == "time":
        with suppress(subprocess.TimeoutExpired):  # it has ended by then, or is ended
            fork_server.run(["-m", "morphtrain.run", *STARTED], tmp_path, timeout=float(seconds))
    else:
        kill(moment, *STARTED)
    result = command(*RUN)
    assert result.returncode == 0, result.stderr
    assert_same(ends(tmp_path / "run"), uninterrupted)
    check_mlflow(tmp_path)


def check_mlflow(directory: Path) -> None:
    """One run, FINISHED, one value an epoch of every metric."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "morphtrain"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    for key in ("train_loss", "val_accuracy", "epoch_seconds", "params", "lasso_ratio"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == list(range(1, EPOCHS + 1)), key


def test_a_broken_checkpoint_is_reported_and_the_one_before_used(
    uninterrupted: dict, tmp_path: Path, command: Command, kill: Kill
) -> None:
    kill("step:100", *STARTED)
    last = tmp_path / "run" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 0xFF
    last.write_bytes(content)
    result = command(*RUN)
    assert result.returncode == 0, result.stderr
    assert "last.pt: damaged" in result.stdout
    assert "previous.pt" in result.stdout
    assert_same(ends(last.parent), uninterrupted)
    check_mlflow(tmp_path)


def test_a_finished_run_only_reports(tmp_path: Path, command: Command) -> None:
    assert command(*RUN).returncode == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    result = command(*RUN)
    assert result.returncode == 0, result.stderr
    assert "last / first" in result.stdout
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    check_mlflow(tmp_path)


def test_a_path_is_continued_elsewhere(uninterrupted: dict, tmp_path: Path, command: Command, kill: Kill) -> None:
    kill("step:100", *STARTED)
    elsewhere = [o for o in RUN if not o.startswith(("hydra.run.dir", "resume"))]
    result = command(*elsewhere, "hydra.run.dir=elsewhere", "resume=run/last.pt")
    assert result.returncode == 0, result.stderr
    assert_same(ends(tmp_path / "elsewhere"), uninterrupted)
    check_mlflow(tmp_path)


def train_here(run_dir: Path, *overrides: str) -> None:
    """The run in this process, whose hash seed is another one."""
    run_dir.mkdir()
    train(morphtrain.compose(*overrides), run_dir, {})


@pytest.mark.parametrize(
    "options",
    [
        ("optimizer=adamw", "prune.lasso_ratio=4", "prune.lasso_ratio_of=initial_norm"),
        ("precision=o1",),
        ("precision=o1", "precision.dtype=float16"),
        ("precision=dfp16", "precision.rounding=stochastic", "precision.bits=12", "batch_policy.max_micro_batch=12"),
        ("model.shortcut=B", "prune.update=subgradient", "prune.threshold=0.02"),
        ("model.shortcut=B", "prune.residual=gating"),
        ("grow=wider", "grow.at_epochs=[1]", "grow.factor=1.5"),
        ("grow=wider", "grow.at_epochs=[1]", "grow.new_lr_factor=0.3", "grow.new_lr_epochs=5"),
        ("grow=deeper", "grow.at_epochs=[2]", "grow.operator=layer", "optimizer=adamw", "grow.new_lr_factor=2"),
        ("grow=deeper", "grow.at_epochs=[3]", "grow.start=half_half"),
        ("grow=selective", "grow.at_epochs=[2]", "grow.operator=auto", "grow.target=2", "prune.lasso_ratio=0.01"),
        ("grow=adaptive", "grow.patience=2", "schedule=constant", "grow.low_accuracy=1", "grow.high_accuracy=1"),
        ("grow=morphnet", "grow.round_epochs=1", "grow.rounds=2", "prune.stop_epoch=2", "grow.inherit=false"),
        ("prune=morphnet",),
        ("optimizer=lars", "norm=ghost", "norm.ghost_batch_size=6", "batch_policy.max_micro_batch=12"),
        ("norm=weight", "grow=wider", "grow.at_epochs=[1]", "optimizer=adamw"),
        ("norm=weight", "norm.mean_only=true", "prune.residual=gating"),
        (
            *("batch_policy=adabatch", "batch_policy.every=1", "batch_policy.max_batch_size=50"),
            *("batch_policy.lr_scaling=linear", "batch_policy.warmup_epochs=1.5", "clip_norm=0.5"),
        ),
        ("data.image_size=16", "data.progressive=0.5", "data.infobatch=0.5"),
    ],
)
def test_other_options_resume_bit_identically(
    options: tuple[str, ...], tmp_path: Path, command: Command, kill: Kill
) -> None:
    here = [*SMALL, "tracking=none", "epochs=4", *options]
    train_here(tmp_path / "once", *here)
    there = [*here, "hydra.run.dir=twice", "resume=auto"]
    kill("rename:4", *there)
    assert command(*there).returncode == 0
    once, twice = (ends(tmp_path / name) for name in ("once", "twice"))
    assert_same(once, twice)


@pytest.mark.parametrize(
    ("moment", "growth"),
    [
        ("morph:7", ("grow=wider", "grow.at_epochs=[2]")),
        ("adopt:2", ("grow=deeper", "grow.at_epochs=[2]")),
        ("step:40", ("grow=deeper", "grow.at_epochs=[2]", "grow.operator=layer")),
    ],
)
def test_killed_inside_a_growth_or_right_after_it(
    moment: str, growth: tuple[str, ...], tmp_path: Path, command: Command, kill: Kill
) -> None:
    quiet = [*SMALL, "tracking=none", "epochs=4", "prune.start_epoch=4", *growth]
    train_here(tmp_path / "once", *quiet)
    there = [*quiet, "hydra.run.dir=twice", "resume=auto"]
    kill(moment, *there)
    assert command(*there).returncode == 0
    once, twice = (ends(tmp_path / name) for name in ("once", "twice"))
    assert_same(once, twice)
    assert once["last"]["facts"]["changes"][1]["epoch"] == 2
