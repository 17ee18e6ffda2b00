"""timing.profile: these steps and no others are in the trace, and nothing else changes but the time of their epochs."""

from __future__ import annotations

import gzip
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Answer, Command
from test_calibration import epochs as calibrated_epochs
from test_closing import pruned, rows
from test_interrupts import at
from test_resume import assert_same, contents

import morphtrain
from morphtrain import interrupts
from morphtrain.errors import UserError
from morphtrain.evidence.calibration import why_not_calibrated
from morphtrain.evidence.records import read_records
from morphtrain.timing.summaries import median_epoch_seconds
from morphtrain.trainer import train
from morphtrain.trainer.profiler import steps_of

STEPS = 16  # of an epoch of SMALL
QUICK = (*SMALL, "timing.reference=0", "tracking=none", "epochs=3")


def trained(directory: Path, *overrides: str, **more: Any) -> Path:
    directory.mkdir(exist_ok=True)
    train(morphtrain.compose(*QUICK, *overrides), directory, {}, **more)
    return directory


def traces(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of each trace, by the name of its file."""
    found = {}
    for path in sorted((run_dir / "profile").glob("*.json.gz")):
        found[path.name.split(".")[0]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def steps_in(events: list[dict[str, Any]]) -> list[int]:
    """The steps that a trace shows, in their order in time."""
    blocks = [event for event in events if re.fullmatch(r"step \d+", event.get("name", "")) and event["ph"] == "X"]
    return [int(block["name"].split()[1]) for block in sorted(blocks, key=lambda block: block["ts"])]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("profiled"), "timing.profile=[20,22]")


def test_the_trace_has_these_steps_and_no_others(run_dir: Path) -> None:
    (name, events), *others = traces(run_dir).items()
    assert (name, others) == ("epoch_0002", [])
    assert steps_in(events) == [20, 21, 22]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("Optimizer.step") for name in names) == 3, "neither more steps nor fewer"
    assert any("convolution_backward" in name for name in names)


def test_the_ten_dearest_operations_are_printed_and_kept(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (run_dir / "profile" / "epoch_0002.txt").read_text()
    assert text.startswith("steps 20 to 22, in epoch 2: the 10 operations that took the most time")
    lines = text.splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("---")]
    shares = [float(re.findall(r"([\d.]+)%", line)[0]) for line in lines[rules[1] + 1 : rules[2]]]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert not re.search(r"^ *step \d", text, re.MULTILINE), "each step would be a row, and leave none for operations"
    (steps,) = [line for line in lines if "a step, outside of operations" in line]
    assert steps.split()[-1] == "3"


def test_profiling_changes_nothing_that_is_computed(run_dir: Path, tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    stored = [contents(directory / "last.pt") for directory in (run_dir, plain)]
    for one in stored:
        one["facts"]["config"].pop("timing")
        for record in one["facts"]["history"]:
            record.pop("profiled", None)
    assert_same(*stored)
    assert not (plain / "profile").exists()
    assert not any("profiled" in record for record in read_records(plain))
    assert [record["profiled"] for record in read_records(run_dir)] == [0, 1, 0]


def test_steps_are_counted_over_the_run_and_across_a_resume(tmp_path: Path) -> None:
    """The last step of an epoch and the first of the next; the batch has grown in between."""
    batches = ["batch_policy=adabatch", "batch_policy.every=1", "batch_policy.factor=2", f"timing.profile=[{STEPS},17]"]
    batches = [*batches, "batch_policy.batch_size=16"]
    directory = trained(tmp_path / "run", *batches, on_epoch=lambda record: record["epoch"] == 1)
    trained(directory, *batches, "resume=auto")
    assert {name: steps_in(events) for name, events in traces(directory).items()} == {
        "epoch_0001": [16],
        "epoch_0002": [17],
    }
    history = read_records(directory)
    assert [record["batch_size"] for record in history] == [16, 25, 25]
    assert list(map(steps_of, history)) == [16, 11, 11]
    assert [record["profiled"] for record in history] == [1, 1, 0]


def test_steps_that_never_come_leave_nothing_and_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = trained(tmp_path / "run", "timing.profile=[1000,1001]", "data.infobatch=0.5")
    assert not (directory / "profile").exists()
    history = read_records(directory)
    steps = sum(map(steps_of, history))
    said = f"timing.profile=[1000, 1001]: none was profiled; the run had the steps 1 to {steps}"
    assert caplog.messages.count(said) == 1
    assert [record["profiled"] for record in history] == [0, 0, 0]
    assert steps_of(history[1]) < STEPS, "infobatch has left images out"


def test_a_signal_in_a_profiled_step_leaves_no_profiler_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(torch.optim.SGD, "step", 20, signal.SIGINT)(monkeypatch)
    with pytest.raises(interrupts.Interrupted):
        trained(tmp_path / "run", "timing.profile=[20,22]")
    assert not torch.autograd._profiler_enabled()
    monkeypatch.undo()
    trained(tmp_path / "run", "timing.profile=[20,22]", "resume=auto")
    assert steps_in(traces(tmp_path / "run")["epoch_0002"]) == [20, 21, 22]


def test_no_median_counts_a_profiled_epoch() -> None:
    history = [{"epoch": e, "warmup": 0.0, "epoch_seconds": 9.0 if e > 2 else 1.0} for e in range(1, 5)]
    assert median_epoch_seconds(history) == 9.0
    for record in history[2:]:
        record["profiled"] = 1.0
    assert median_epoch_seconds(history) == 1.0
    table = pruned()
    before, _ = rows(table)
    table[-1] |= {"epoch_seconds": 99.0, "profiled": 1.0}
    after, _ = rows(table)
    assert after["seconds an epoch"][:2] == [before["seconds an epoch"][0], "2.100"], "of 2.0 and 2.2"
    assert after["profiled epochs"][1] == "1 of 10"
    assert "profiled epochs" not in before


def test_a_profiled_epoch_does_not_make_calibrated_times_doubtful() -> None:
    history = calibrated_epochs(0.70, 0.62, 10.6, 0.67, disturbed=2)
    assert why_not_calibrated(history) != ""
    history[2]["profiled"] = 1.0
    assert why_not_calibrated(history) == ""


@pytest.mark.parametrize("words", [("-m", "seed=1,2"), ("+sweep=prunetrain",), ("+experiment=recipe",)])
def test_what_compares_times_refuses_it(words: tuple[str, ...], answer: Answer) -> None:
    said = answer(*words, "timing.profile=[1,2]")
    assert said == "timing.profile=[1,2]: must be null in a multirun: it compares times; profile one run"


@pytest.mark.parametrize("value", ["[0,1]", "[3,2]", "[1]", "[1,2,3]", "5"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"^timing\.profile=.*: must be "):
        morphtrain.compose(f"timing.profile={value}")


@pytest.mark.slow
def test_of_several_processes_the_first_is_profiled(command: Command, tmp_path: Path) -> None:
    several = ["processes=2", "timing.cores=1", "epochs=2", "hydra.run.dir=run"]
    result = command(*QUICK, *several, "timing.profile=[20,21]")
    assert result.returncode == 0, result.stderr
    assert {name: steps_in(events) for name, events in traces(tmp_path / "run").items()} == {"epoch_0002": [20, 21]}
    assert result.stdout.count("the 10 operations that took the most time") == 1


@pytest.mark.gpu
def test_on_a_gpu_its_kernels_are_in_the_trace(tmp_path: Path) -> None:
    directory = trained(tmp_path / "run", "timing.profile=[20,21]", "device=cuda")
    assert any(event.get("cat") == "kernel" for event in traces(directory)["epoch_0002"])
    assert "Self CUDA" in (directory / "profile" / "epoch_0002.txt").read_text()
