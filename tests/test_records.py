"""The commands of the README leave in MLflow, and in the run directory, all that the contracts name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Command
from fork_server import ForkServer
from torch import nn

import morphtrain
from morphtrain import schema
from morphtrain.cost import count_macs, count_params
from morphtrain.errors import UserError

METRICS = {
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "epoch_seconds",
    "morph_seconds",
    "train_seconds",
    "samples_per_second",
    "params",
    "macs",
    "channel_density",
    "weight_density",
    "batch_size",
    "learning_rate",
    "peak_memory_bytes",
    "changed",
    "settle_seconds",
    "median_epoch_seconds",
}
TIMED = ("setup_seconds", "epoch_seconds", "morph_seconds")  # what `train_seconds` adds up
UNPRUNED = [*(o for o in SMALL if not o.startswith("prune")), "prune=none"]
TAGS = {
    *("prune", "grow", "norm", "precision", "gradient", "batch_policy", "optimizer", "model", "data"),
    *("seed", "device", "study"),
}


@pytest.fixture(scope="module")
def sweep(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multirun of two options and two seeds."""
    directory = tmp_path_factory.mktemp("sweep")
    for overrides in (SMALL, UNPRUNED):
        fork_server.run(["-m", "morphtrain.run", "-m", *overrides, "seed=1,2"], directory).check_returncode()
    return directory


def client(directory: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{directory}/mlflow.db")


def runs(directory: Path) -> list:
    c = client(directory)
    experiment = c.get_experiment_by_name("morphtrain")
    return c.search_runs([experiment.experiment_id])


def test_every_run_has_every_metric_once_an_epoch(sweep: Path) -> None:
    found = runs(sweep)
    assert {(r.data.tags["prune"], r.data.tags["seed"]) for r in found} == {
        (prune, seed) for prune in ("none", "prunetrain") for seed in ("1", "2")
    }
    for run in found:
        assert run.info.status == "FINISHED"
        expected = METRICS | ({"lasso_ratio"} if run.data.tags["prune"] == "prunetrain" else set())
        assert expected <= set(run.data.metrics)
        for metric in expected:
            history = client(sweep).get_metric_history(run.info.run_id, metric)
            assert [m.step for m in history] == [1, 2, 3, 4, 5, 6], metric


def test_every_run_has_its_params_tags_and_artifacts(sweep: Path) -> None:
    for run in runs(sweep):
        assert set(run.data.tags) >= TAGS
        assert run.data.tags["model"] == "resnet8"
        assert run.data.tags["study"] != "none"
        assert run.data.params["model.width"] == "8"
        assert run.data.params["optimizer.lr"] == "0.1"
        artifacts = {a.path for a in client(sweep).list_artifacts(run.info.run_id)}
        assert {"config", "last.pt", "plots"} <= artifacts


def test_metrics_mean_what_their_names_say(sweep: Path) -> None:
    for run in runs(sweep):
        m = run.data.metrics
        history = {
            key: [x.value for x in client(sweep).get_metric_history(run.info.run_id, key)]
            for key in (*TIMED, "train_seconds", "channel_density", "weight_density")
        }
        spent = sum(sum(history[key]) for key in TIMED)
        assert m["train_seconds"] == pytest.approx(spent)
        assert m["samples_per_second"] == pytest.approx(256 / m["epoch_seconds"])
        assert 0 <= m["val_accuracy"] <= 1
        if run.data.tags["prune"] == "none":
            assert set(history["channel_density"]) == set(history["weight_density"]) == {1.0}
            assert sum(history["morph_seconds"]) < 0.01


def test_the_checkpoint_alone_rebuilds_the_network(sweep: Path) -> None:
    for run in runs(sweep):
        directory = Path(run.data.tags["run_dir"])
        state = torch.random.get_rng_state()
        model = morphtrain.load(directory / "last.pt")
        assert torch.equal(torch.random.get_rng_state(), state), "loading a network is no reason to reseed"
        assert not model.training
        assert count_params(model) == run.data.metrics["params"]
        assert count_macs(model, (3, 8, 8)) == run.data.metrics["macs"]
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_the_best_epoch_is_kept_beside_the_last(sweep: Path) -> None:
    for run in runs(sweep):
        records = [json.loads(line) for line in (Path(run.data.tags["run_dir"]) / "records.jsonl").open()]
        found = min(records, key=lambda r: (-r["val_accuracy"], r["macs"], r["epoch"]))
        model = morphtrain.load(Path(run.data.tags["run_dir"]) / "best.pt")
        assert count_params(model) == found["params"]
        uploaded = {artifact.path for artifact in client(sweep).list_artifacts(run.info.run_id)}
        assert "last.pt" in uploaded
        assert ("best.pt" in uploaded) == (found["epoch"] < len(records))


def test_the_loaded_network_is_as_accurate_as_recorded(sweep: Path) -> None:
    from morphtrain.data.synthetic import build

    data = build(schema.data.Synthetic("synthetic", 256, 64, 8, 3, 10, 1.0))
    for run in runs(sweep):
        model = morphtrain.load(Path(run.data.tags["run_dir"]) / "last.pt")
        right = (model(data.val.pixels).argmax(1) == data.val.labels).float().mean().item()
        assert right == pytest.approx(run.data.metrics["val_accuracy"], abs=1e-6)


def test_the_architecture_of_every_morph_is_kept(sweep: Path) -> None:
    changed = [r for r in runs(sweep) if r.data.tags["prune"] == "prunetrain"]
    for run in changed:
        directory = Path(run.data.tags["run_dir"])
        files = sorted((directory / "architecture").glob("*.json"))
        assert files
        uploaded = {Path(a.path).name for a in client(sweep).list_artifacts(run.info.run_id, "architecture")}
        assert uploaded == {f.name for f in files}
        facts = json.loads(files[-1].read_text())
        stored = morphtrain.load(directory / "last.pt").state_dict()
        assert {name: list(t.shape) for name, t in stored.items()} == facts["shapes"]


def test_two_runs_of_a_seed_are_bit_identical_and_two_seeds_are_not(
    sweep: Path, command: Command, tmp_path: Path
) -> None:
    assert command(*UNPRUNED, "tracking=none", "hydra.run.dir=again").returncode == 0
    again = morphtrain.load(tmp_path / "again" / "last.pt").state_dict()
    for run in runs(sweep):
        if run.data.tags["prune"] == "none":
            other = morphtrain.load(Path(run.data.tags["run_dir"]) / "last.pt").state_dict()
            same = all(torch.equal(other[name], again[name]) for name in again)
            assert same == (run.data.tags["seed"] == "1")


def test_too_few_epochs_to_shrink_are_reported(command: Command) -> None:
    result = command(*SMALL, "tracking=none", "epochs=1", "prune.start_epoch=5")
    assert result.returncode == 0, result.stderr
    assert "prune.start_epoch=5 is after the last epoch (epochs=1)" in result.stdout
    result = command(*SMALL, "tracking=none", "epochs=1", "prune.start_epoch=1")
    assert "prune.start_epoch=1 is the last epoch: no epoch will train a smaller network" in result.stdout


def test_a_tracking_server_that_is_gone_does_not_stop_training(command: Command) -> None:
    result = command(*SMALL, "epochs=2", "tracking.uri=http://127.0.0.1:9", "prune.start_epoch=1")
    assert result.returncode == 0, result.stderr
    assert "starting the run failed, training goes on" in result.stdout
    assert "epoch    2/2" in result.stdout


def test_loading_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        morphtrain.load(tmp_path / "nothing.pt")
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(UserError, match="not a checkpoint of MorphTrain"):
        morphtrain.load(tmp_path / "linear.pt")
