"""best.pt is the checkpoint of the best epoch, whatever happens to the run."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from conftest import SMALL

import morphtrain
from morphtrain.files import link_atomically
from morphtrain.state import Run
from morphtrain.trainer import best, checkpoint
from morphtrain.trainer.build import build_run

History = list[dict[str, float]]


def advance(run: Run, accuracy: float, macs: int, directory: Path, killed: bool = False) -> None:
    """An epoch that ends like this; `killed` between its two checkpoints."""
    run.epoch = len(run.history) + 1
    run.history.append({"epoch": run.epoch, "val_accuracy": accuracy, "macs": macs, "timestamp": random.random()})
    checkpoint.save(run, directory, None)
    if not killed:
        best.keep(run, directory)


def kept(directory: Path) -> int:
    return checkpoint.Checkpoint(directory / "best.pt").facts["epoch"]


def oracle(history: History) -> float:
    """The most accurate, then the smallest, then the earliest."""
    return sorted(history, key=lambda r: (-r["val_accuracy"], r["macs"], r["epoch"]))[0]["epoch"]


@pytest.fixture(scope="module")
def built() -> Run:
    return build_run(morphtrain.compose(*[option for option in SMALL if not option.startswith("prune")]))


@pytest.fixture
def run(built: Run) -> Run:
    """A run before its first epoch."""
    built.history = []
    return built


@pytest.mark.parametrize("seed", range(3))
def test_it_follows_the_best_epoch(seed: int, run: Run, tmp_path: Path) -> None:
    draw = random.Random(seed)
    for _ in range(6):
        advance(run, draw.choice([0.5, 0.6, 0.7]), draw.choice([10, 20]), tmp_path)
        assert kept(tmp_path) == oracle(run.history)
        assert best.is_another(run, tmp_path) == (kept(tmp_path) != run.epoch)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt", "previous.pt"]


def test_it_costs_no_writing_while_it_is_the_newest(run: Run, tmp_path: Path) -> None:
    advance(run, 0.5, 10, tmp_path)
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt")
    advance(run, 0.4, 10, tmp_path)
    assert (tmp_path / "best.pt").samefile(tmp_path / "previous.pt")


def test_a_run_killed_between_its_two_checkpoints(run: Run, tmp_path: Path) -> None:
    advance(run, 0.5, 10, tmp_path)
    advance(run, 0.6, 10, tmp_path, killed=True)
    assert kept(tmp_path) == 1
    best.carry_on(run, tmp_path / "last.pt", tmp_path)
    assert kept(tmp_path) == 2


def test_a_run_that_goes_on_elsewhere(run: Run, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    advance(run, 0.6, 10, there)
    advance(run, 0.5, 10, there)
    best.carry_on(run, there / "last.pt", here)
    assert kept(here) == 1
    advance(run, 0.55, 10, here)
    assert kept(here) == 1
    advance(run, 0.7, 10, here)
    assert (kept(here), kept(there)) == (4, 1)


@pytest.mark.parametrize("damage", ["gone", "damaged", "of another run", "of a future that is lost"])
def test_one_that_is_not_the_best_of_this_run_does_not_stay(
    damage: str, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "best.pt"
    advance(run, 0.6, 10, tmp_path)
    advance(run, 0.5, 10, tmp_path)
    if damage == "gone":
        file.unlink()
    elif damage == "damaged":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.unlink()
        file.write_bytes(content)
    elif damage == "of another run":
        run.history[0]["timestamp"] += 1
    else:
        advance(run, 0.9, 10, tmp_path)
        run.history.pop()
    best.carry_on(run, tmp_path / "last.pt", tmp_path)
    assert not file.exists()
    assert "epoch 1 was the best so far" in caplog.text
    advance(run, 0.55, 10, tmp_path)
    assert not file.exists()
    assert not best.is_another(run, tmp_path)
    advance(run, 0.65, 10, tmp_path)
    assert kept(tmp_path) == run.epoch


def test_the_one_before_may_be_the_best(run: Run, tmp_path: Path) -> None:
    """last.pt, which was the best, is damaged; the run goes on from previous.pt."""
    advance(run, 0.5, 10, tmp_path)
    advance(run, 0.6, 10, tmp_path)
    advance(run, 0.7, 10, tmp_path)
    run.history.pop()
    best.carry_on(run, tmp_path / "previous.pt", tmp_path)
    assert kept(tmp_path) == 2


def test_a_file_system_without_links_gets_a_copy(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    advance(run, 0.6, 10, tmp_path)
    advance(run, 0.5, 10, tmp_path)
    assert kept(tmp_path) == 1
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt", "previous.pt"]


def test_a_second_name_is_not_a_second_writer(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("first")
    link_atomically(a, b)
    link_atomically(a, b)  # the same file already
    assert b.read_text() == "first"
    with pytest.raises(OSError, match="none"):
        link_atomically(tmp_path / "none", b)
    assert b.read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
