"""Growth and searches that start from trained weights."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch
from conftest import SMALL, Command
from test_resume import assert_same

import morphtrain
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.trainer import begin_epoch, checkpoint, finish_epoch, new_run, start, train_epoch
from morphtrain.trainer.loop import evaluate

QUIET = (*SMALL, "tracking=none", "timing.reference=0", "device=cpu", "model.width=4", "model.blocks=1")
PLAIN = tuple(o for o in QUIET if not o.startswith("prune"))
STILL = ("optimizer.lr=1e-12", "schedule.warmup_epochs=0", "optimizer.weight_decay=0")  # nothing but growth changes it
UNPRUNED = (
    "prune=prunetrain",
    "prune.threshold=1e-12",
    "prune.start_epoch=1",
    "prune.interval=1",
    "prune.stop_epoch=2",
)
HARD = ("data.noise=3", "epochs=12")  # so that there is something to learn, and time to see that nothing is learnt
GROWTHS = {
    "wider": ("grow=wider", "grow.at_epochs=[1]"),
    "blocks": ("grow=deeper", "grow.at_epochs=[1]"),
    "layers": ("grow=deeper", "grow.at_epochs=[1]", "grow.operator=layer"),
    "selective": (*UNPRUNED, "grow=selective", "grow.at_epochs=[1]", "grow.target=1.5"),
    "morphnet": (*UNPRUNED, "grow=morphnet", "grow.round_epochs=2", "grow.target=1.5"),
    "adaptive": ("grow=adaptive", "grow.patience=2", "grow.low_accuracy=1", "grow.high_accuracy=1", *HARD),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a network that has learnt the images."""
    directory, run = tmp_path_factory.mktemp("base"), new_run(morphtrain.compose(*PLAIN), torch.device("cpu"))
    start(run)
    for _ in range(4):
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run)
    assert run.history[-1]["val_accuracy"] > 0.5
    checkpoint.save(run, directory, None)
    return directory / "last.pt"


@pytest.mark.parametrize("growth", GROWTHS)
def test_what_grows_computes_what_was_trained(growth: str, base: Path) -> None:
    """A learning rate of nearly zero, so that whatever grows from the weights of the file is all that may change it."""
    config = morphtrain.compose(*PLAIN, *STILL, f"model.weights={base}", "epochs=5", *GROWTHS[growth])
    run = new_run(config, torch.device("cpu"))
    assert_same(run.model.state_dict(), morphtrain.load(base).state_dict())
    start(run)
    run.settle()
    params, (loss, accuracy) = run.params, evaluate(run)
    while not run.ended:
        begin_epoch(run)
        train_epoch(run)
        record = finish_epoch(run)
    assert record["params"] > params, "it has grown"
    assert record["val_accuracy"] == pytest.approx(accuracy, abs=0.05)
    assert record["val_loss"] == pytest.approx(loss, rel=0.1, abs=0.1)


def test_rounds_that_draw_all_weights_again_are_refused(base: Path) -> None:
    keys = (*PLAIN, *GROWTHS["morphnet"], f"model.weights={base}")
    with pytest.raises(UserError, match=r"grow\.inherit=false with model\.weights=.*: its rounds draw all weights"):
        morphtrain.compose(*keys, "grow.inherit=false")
    morphtrain.compose(*keys, "grow.inherit=true")


def test_every_trial_of_a_sweep_starts_from_them(base: Path, command: Command, tmp_path: Path) -> None:
    """The file is named by a path from where the sweep was started; the baseline starts from it, too."""
    (tmp_path / "base.pt").write_bytes(base.read_bytes())
    sweep = ("hydra.sweeper.n_trials=2", "hydra.sweeper.min_accuracy=null", "optimizer.lr=0.001")
    result = command("-m", "+sweep=prunetrain", *QUIET, *sweep, "epochs=2", "model.weights=base.pt")
    assert result.returncode == 0, result.stdout + result.stderr
    study = optuna.load_study(study_name="prunetrain", storage=f"sqlite:///{tmp_path}/optuna.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    for number in range(2):
        directory = tmp_path / "multirun" / "prunetrain" / str(number)
        assert "weights_sha256" in (directory / "environment.json").read_text()
        assert read_records(directory)[0]["train_accuracy"] > 0.5, "after an epoch from fresh weights it is less"
