"""The closing table: each network is timed while it was trained, and no ratio is shown that is known to be false."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Command
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

import morphtrain
from morphtrain import schema
from morphtrain.timing.summaries import NEVER
from morphtrain.tracking import store
from morphtrain.trainer import console
from morphtrain.trainer.build import build_run
from morphtrain.trainer.closing import closing_table
from morphtrain.trainer.epoch import start

INITIAL = {"params": 1000, "macs": 5000}


def record(epoch: int, size: int, seconds: float, **more: float) -> dict[str, float]:
    """An epoch of `seconds`, after which the network has `size` parameters."""
    return {
        "epoch": epoch,
        "epoch_seconds": seconds,
        "data_seconds": 0.1,
        "train_seconds": 60.0,
        "params": size,
        "macs": 5 * size,
        "batch_size": 32,
        "val_accuracy": epoch / 100,
        "contended": 0.0,
        **more,
    }


def rows(
    history: list[dict[str, float]], warmup: int = 1, objective: Sequence[str] = ()
) -> tuple[dict[str, list[str]], str]:
    """The cells by the row's name, and everything that is printed."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(closing_table(history, INITIAL, warmup, objective))
    text = capture.get()
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]
    return {name: values for name, *values in cells}, text


def pruned(**more: float) -> list[dict[str, float]]:
    """Ten epochs of 4 s, the first of them slower; the network is pruned after epoch 4, and again after epoch 7."""
    seconds = [9.0, 4.0, 4.2, 4.4, 3.0, 3.0, 3.0, 2.0, 2.2, 2.4]
    sizes = [1000, 1000, 1000, 600, 600, 600, 300, 300, 300, 300]
    return [record(e, n, s, **more) for e, (n, s) in enumerate(zip(sizes, seconds, strict=True), 1)]


def test_each_network_is_timed_while_it_was_trained() -> None:
    table, text = rows(pruned())
    assert "first network" in text
    assert "dense" not in text
    assert table["seconds an epoch"] == ["4.200", "2.200", f"{2.2 / 4.2:.3f}"]
    assert table["(medians of epochs)"] == ["2-4", "8-10", ""]
    assert table["parameters"] == ["1000", "300", "0.300"]
    assert table["validation accuracy at the end"] == ["", "0.1000", ""], "an early accuracy is no baseline"
    assert "test accuracy at the end" not in table
    assert rows(pruned(test_accuracy=0.5))[0]["test accuracy at the end"] == ["", "0.5000", ""]


def test_the_objective_is_shown() -> None:
    history = pruned(median_epoch_seconds=2.25, time_to_accuracy=31.5, val_loss=0.25)
    objective = ["median_epoch_seconds", "time_to_accuracy", "val_accuracy", "train_seconds", "no_such_metric"]
    table = rows(history, objective=objective)[0]
    assert table["median_epoch_seconds"] == ["", "2.25", ""]
    assert table["time_to_accuracy"] == ["", "31.5", ""]
    assert table.keys() & {*objective, "val_loss"} == {"median_epoch_seconds", "time_to_accuracy"}
    assert "time_to_accuracy" not in rows(history)[0]
    assert "not reached" in rows(pruned(time_to_accuracy=1.05 * NEVER), objective=objective)[1]
    assert "after 1 epoch, " in rows(history[:1])[1]


def test_several_processes_are_counted_and_what_they_wait_for_each_other_is_shown() -> None:
    table, text = rows(pruned(processes=2.0, comm_seconds=0.42))
    assert "after 10 epochs, 60.0 s of training in 2 processes" in text
    assert table["share of an epoch spent waiting for others"] == ["0.100", f"{0.42 / 2.2:.3f}", ""]
    alone = rows([*pruned()[:4], *pruned(processes=2.0, comm_seconds=0.42)[4:]])
    assert not any("others" in name for name in alone[0]), "no such share of the first network is known"
    assert "processes" not in rows(pruned())[1]


def test_a_network_that_grew_began_as_the_first_not_as_the_dense_one() -> None:
    table, text = rows([record(e, 1000 if e < 4 else 3000, 1.0 if e < 5 else 3.0) for e in range(1, 9)])
    assert table["seconds an epoch"] == ["1.000", "3.000", "3.000"]
    assert table["(medians of epochs)"] == ["2-4", "5-8", ""]
    assert "dense" not in text


def test_a_network_that_never_changed_is_compared_with_nothing() -> None:
    table, text = rows([record(e, 1000, 10.0 / e) for e in range(1, 6)])
    assert table["parameters"] == ["1000"]
    assert table["seconds an epoch"] == [f"{(10 / 3 + 10 / 4) / 2:.3f}"]
    assert "first" not in text


def test_other_batch_sizes_are_another_stage() -> None:
    history = [record(e, 1000, 4.0 if e < 4 else 1.0, batch_size=32 if e < 4 else 64) for e in range(1, 8)]
    table, _ = rows(history)
    assert table["batch size"] == ["32", "64", ""]
    assert table["seconds an epoch"] == ["4.000", "1.000", "0.250"]


def test_a_network_that_changed_before_a_clean_epoch_has_no_time() -> None:
    table, text = rows([record(e, 500, 2.0) for e in range(1, 6)])
    assert table["seconds an epoch"] == ["-", "2.000", ""]
    assert "no epoch after the warm-up trained the first network" in text


def test_a_change_after_the_last_epoch_is_said() -> None:
    history = [*pruned(), record(11, 200, 2.6)]
    table, text = rows(history)
    assert table["parameters"][1] == "200"
    assert table["seconds an epoch"][1] == "2.300"
    assert "before the change after epoch 11" in text
    table, text = rows([*[record(e, 1000, 4.0) for e in range(1, 5)], record(5, 400, 4.0)])
    assert table["seconds an epoch"] == ["4.000", "-", ""]
    assert "no epoch after the warm-up trained the last network" in text


def contended(calibrated: bool, measured_again: int = 5) -> list[dict[str, float]]:
    """The issue's case: epochs of one calibrated second throughout, while others hold the cores at first."""
    history = []
    for e in range(1, 9):
        busy = e < 5
        reference = 6.0 if e < measured_again else 1.0
        more = {"calibrated_seconds": 1.0 + e / 100, "reference_seconds": reference} if calibrated else {}
        history.append(record(e, 1000 if e < 4 else 900, 6.0 if busy else 1.0, contended=float(busy), **more))
    return history


def test_no_ratio_is_shown_that_is_known_to_be_false() -> None:
    table, text = rows(contended(calibrated=False))
    assert table["seconds an epoch"] == ["6.000", "1.000", ""]
    assert "epochs were contended, and timing.reference=0 calibrates none" in text
    assert table["contended epochs"] == ["", "4 of 8", ""]


def test_one_measurement_of_the_machine_calibrates_nothing() -> None:
    """In a run of a few seconds there is only the one before it: calibrated times are the clock's, divided by it."""
    table, text = rows(contended(calibrated=True, measured_again=99))
    assert "seconds an epoch, calibrated" not in table
    assert table["seconds an epoch"][2] == ""
    assert "the machine was measured too seldom" in text


def test_the_calibrated_ratio_is_shown_in_its_place() -> None:
    table, text = rows(contended(calibrated=True))
    assert table["seconds an epoch"] == ["6.000", "1.000", ""], "0.167 is false"
    assert table["seconds an epoch, calibrated"] == ["1.030", "1.065", f"{1.065 / 1.03:.3f}"]
    assert "No ratio" not in text


EPOCHS = st.lists(
    st.tuples(st.sampled_from([1000, 1000, 700, 400]), st.booleans(), st.floats(0.5, 9.0)), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(epochs=EPOCHS, warmup=st.integers(0, 2))
def test_the_ratio_is_that_of_the_epochs_that_trained_the_two_networks(
    epochs: list[tuple[int, bool, float]], warmup: int
) -> None:
    """Against an account that walks from each end of the run to the first change."""
    history = [record(e, n, s, contended=float(c)) for e, (n, c, s) in enumerate(epochs, 1)]
    trained = [1000, *(size for size, _, _ in epochs[:-1])]  # by each epoch
    ahead = next((i for i, size in enumerate(trained) if size != trained[0]), len(trained))
    back = next((i for i in range(len(trained), 0, -1) if trained[i - 1] != trained[-1]), 0)
    sides = [[r for r in side if r["epoch"] > warmup] for side in (history[:ahead], history[back:])]
    clean = [[r for r in side if not r["contended"]] for side in sides]
    table, text = rows(history, warmup)
    if len(set(trained)) == 1:
        assert "/" not in table["seconds an epoch"][-1]
        assert ("last / first" in text) == (epochs[-1][0] != 1000)
        return
    ratio = table["seconds an epoch"][2]
    if all(clean):
        first, last = (statistics.median(r["epoch_seconds"] for r in side) for side in clean)
        assert ratio == f"{last / first:.3f}"
    else:
        assert ratio == ""
        assert "No ratio of times" in text


@pytest.mark.parametrize("tracking", ["none", "mlflow"])
def test_the_last_line_names_what_shows_the_records(tracking: str, command: Command, tmp_path: Path) -> None:
    small = ["data.progressive=0.5", "data.infobatch=0.25", "data.infobatch_until=0.5", "gradient=approximate"]
    result = command(*SMALL, *small, "epochs=4", "prune.start_epoch=1", f"tracking={tracking}")
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("next:"))
    shows = "; to compare: python -m morphtrain.ui"
    baseline = "prune=none gradient=none data.progressive=1 data.infobatch=0, the baseline"
    assert line == f"next:          the same command with {baseline}{shows if tracking != 'none' else ''}"


TINY = ("data=synthetic", "data.train_samples=64", "data.val_samples=16", "data.image_size=16", "epochs=4")


@pytest.mark.parametrize("model", ["resnet8", "vgg8", "mobilenet", "alexnet"])
def test_a_plain_run_is_shown_the_recipe_and_it_can_be_run(model: str) -> None:
    keys = (*TINY, f"model={model}")
    run = build_run(morphtrain.compose(*keys))
    found = console._counterpart(run)
    assert found == "prune=early data.progressive=0.7 data.infobatch=0.5, the recipe"
    run = build_run(morphtrain.compose(*keys, *found.removesuffix(", the recipe").split()))
    start(run)
    assert console._counterpart(run) == "prune=none data.progressive=1 data.infobatch=0, the baseline"


def test_the_recipe_is_that_of_the_experiment() -> None:
    arms: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / "experiment" / "recipe.yaml").hydra.sweeper.arms)
    whole = [override for part in arms["recipe"]["parts"] for override in arms[part]["overrides"]]
    assert set(console.RECIPE) <= set(whole)
    known = {"prune.target=0.5", "prune.by=0.25", "prune.cuts=2"}  # the default, and of a run of eight epochs
    assert set(whole) - set(console.RECIPE) == known


@pytest.mark.parametrize(
    "keys",
    [
        ("epochs=3",),
        ("model=torchvision", "model.name=resnet18"),
        ("data.mixup=0.2",),
        ("optimizer=isgd", "data.order=cycle"),
    ],
)
def test_nothing_is_suggested_that_is_not_known_to_run(keys: tuple[str, ...]) -> None:
    run = build_run(morphtrain.compose(*TINY, *keys))
    assert console._next(run, "") == ""
    assert console._next(run, "morphtrain ui") == "to compare: morphtrain ui"


def test_places_are_named_from_where_the_user_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hydra.job.chdir=true a run goes to its directory, and the user does not."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr(store, "home", lambda: tmp_path)
    assert str(store.from_home(tmp_path / "run" / "last.pt")) == "run/last.pt"


def test_a_server_is_named_without_its_password() -> None:
    assert store.view("http://me:secret@there:5000") == "http://me:***@there:5000"
    assert "secret" not in store.view("postgresql://me:secret@there/mlflow")


def test_networks_trained_on_images_of_different_sizes_are_not_compared() -> None:
    """Epochs of small images are 1 to 6; the network was pruned after the fourth."""
    history = [{**one, "image_size": 20.0 if one["epoch"] <= 6 else 28.0} for one in pruned()]
    table, text = rows(history)
    assert table["pixels a side"] == ["20", "28", ""]
    assert table["seconds an epoch"][:2] == ["4.200", "2.200"]
    assert table["seconds an epoch"][2] == ""
    assert "No ratio of times: the networks were trained on images of different sizes." in text
    same = [{**one, "image_size": 20.0} for one in pruned()]
    assert rows(same)[0] == rows(pruned())[0]


def test_the_times_of_one_size_of_images_are_not_mixed_with_those_of_another() -> None:
    """The network stays the same, and the last two of six epochs have full images."""
    seconds = [9.0, 2.0, 2.1, 2.2, 4.0, 4.2]
    sizes = [20.0] * 4 + [28.0] * 2
    table, _ = rows([record(e, 1000, s, image_size=n) for e, (s, n) in enumerate(zip(seconds, sizes, strict=True), 1)])
    assert table["seconds an epoch"] == ["2.100", "4.100", ""]
    assert table["(medians of epochs)"] == ["2-4", "5-6", ""]


def test_an_epoch_that_left_images_out_is_timed_as_if_it_had_all() -> None:
    history = [{**one, "share_trained": 0.5 if one["epoch"] <= 7 else 1.0} for one in pruned()]
    table = rows(history)[0]
    assert table["seconds an epoch"] == ["8.400", "2.200", f"{2.2 / 8.4:.3f}"]
    assert (
        table["share of an epoch spent waiting for data"]
        == rows(pruned())[0]["share of an epoch spent waiting for data"]
    )
