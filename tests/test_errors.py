"""What a user gets wrong gives a short message that names it, a non-zero exit code, and nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KILLED_RUN, SMALL, Command

ANY_MODEL = [override for override in SMALL if not override.startswith("model.")]  # without the keys of a ResNet

CASES = {
    "mistyped key": (["prune=prunetrain", "prune.laso_ratio=0.2"], ["laso_ratio", "lasso_ratio"]),
    "added key": (["+prune.strength=1", "prune=prunetrain"], ["prune.strength", "lasso_ratio"]),
    "added top-level key": (["+epoch=3"], ["epoch:", "epochs"]),
    "mistyped option": (["prune=prunetrian"], ["prunetrian", "prunetrain"]),
    "mistyped group": (["prun=prunetrain"], ["prun"]),
    "ratio 1.5": (
        ["prune=prunetrain", "prune.lasso_ratio=1.5", "prune.lasso_ratio_of=loss"],
        ["prune.lasso_ratio=1.5", "between 0 and 1", "prune.lasso_ratio_of=loss"],
    ),
    "no ratio": (
        ["prune=prunetrain", "prune.lasso_ratio=0"],
        ["prune.lasso_ratio=0.0", "above 0", "prune.lasso_ratio_of=initial_norm"],
    ),
    "infinite ratio": (["prune=morphnet", "prune.lasso_ratio=inf"], ["prune.lasso_ratio=inf", "above 0"]),
    "ratio of what": (
        ["prune=prunetrain", "prune.lasso_ratio_of=norm"],
        ["prune.lasso_ratio_of=norm", "initial_norm"],
    ),
    "threshold -1": (["prune=prunetrain", "prune.threshold=-1"], ["prune.threshold=-1", "above 0"]),
    "no number": (["prune=prunetrain", "prune.interval=often"], ["prune.interval=often"]),
    "residual": (["prune=prunetrain", "prune.residual=both"], ["prune.residual=both", "union, gating"]),
    "rounding": (["prune=prunetrain", "prune.round_to=best"], ["prune.round_to=best", "auto"]),
    "rounding down": (
        ["prune=prunetrain", "prune.round_down=0.1"],
        ["prune.round_down=0.1: must be 0 with prune.round_to=1; prune.round_to=auto allows it"],
    ),
    "rounding all down": (["prune=prunetrain", "prune.round_to=auto", "prune.round_down=1"], ["prune.round_down=1"]),
    "rounding to none": (["prune=prunetrain", "prune.round_to=0"], ["prune.round_to=0", "1 or more"]),
    "no time to grow": (["grow=wider"], ["grow.at_epochs=[]", "grow.patience"]),
    "growth after the end": (["grow=wider", "grow.at_epochs=[60]"], ["grow.at_epochs=[60]", "epochs=60"]),
    "factor 1": (["grow=wider", "grow.at_epochs=[2]", "grow.factor=1"], ["grow.factor=1", "above 1"]),
    "even kernel": (["grow=deeper", "grow.at_epochs=[2]", "grow.kernel=4"], ["grow.kernel=4", "odd"]),
    "selective without pruning": (["grow=selective", "grow.at_epochs=[2]"], ["grow=selective", "prune=prunetrain"]),
    "pruning after the last round": (
        ["grow=morphnet", "prune=prunetrain"],
        ["prune.stop_epoch=None", "10 or earlier"],
    ),
    "rounds after the end": (
        ["grow=morphnet", "prune=prunetrain", "grow.rounds=6", "prune.stop_epoch=60"],
        ["grow.rounds=6", "epochs=60"],
    ),
    "accuracies": (["grow=adaptive", "grow.high_accuracy=0.5"], ["grow.high_accuracy=0.5", "0.9"]),
    "ratio and strength": (
        ["prune=morphnet", "prune.strength=1e-8"],
        ["prune.lasso_ratio=4.0", "prune.strength=1e-08"],
    ),
    "neither of them": (["prune=morphnet", "prune.lasso_ratio=null"], ["prune.lasso_ratio=None", "prune.strength"]),
    "cost": (["prune=morphnet", "prune.cost=params"], ["prune.cost=params", "flops, model_size, latency"]),
    "rounding by the clock": (["prune=morphnet", "prune.round_to=auto"], ["prune.round_to=auto"]),
    "trial of no study": (["+sweep=prunetrain", "trial=1"], ["trial=1: must be null", "hydra/sweeper=morphtrain"]),
    "trial of a plain multirun": (
        ["-m", "hydra.sweep.dir=outputs", "trial=1"],
        ["trial=1: must be null", "hydra/sweeper=morphtrain"],
    ),
    "zero epochs": (["epochs=0"], ["epochs=0", "1 or more"]),
    "zero blocks": (["model.blocks=0"], ["model.blocks=0", "1 or more"]),
    "blocks and stages": (["model.blocks=[1,2]"], ["model.blocks=[1, 2]", "list of 3"]),
    "shortcut": (["model.shortcut=C"], ["model.shortcut=C", "A, B"]),
    "bottleneck": (["model.bottleneck=true"], ["model.layers=2", "3 or more"]),
    "learning rate": (["optimizer.lr=0"], ["optimizer.lr=0", "above 0"]),
    "objective": (["objective=[accuracy]"], ["objective=accuracy", "val_accuracy"]),
    "milestones": (["schedule=milestones", "schedule.milestones=[60,80]"], ["schedule.milestones", "fractions"]),
    "resize below the crop": (
        ["data=image_folder", "data.image_size=64", "data.resize=32"],
        ["data.resize=32", "auto, or 64 (data.image_size) or more"],
    ),
    "in memory perhaps": (["data=image_folder", "data.in_memory=maybe"], ["data.in_memory=maybe", "auto, or true"]),
    "unknown device": (["device=gpu"], ["device=gpu", "cuda"]),
}

# These need torch, and so a second or more each.
SLOWER_CASES = {
    "absent device": (["device=cuda:7"], ["device=cuda:7", "cpu"]),
    "nowhere to grow": (
        ["grow=wider", "grow.at_epochs=[2]", "grow.where=[stage]"],
        ["grow.where=['stage']", "stages.1"],
    ),
    "no stage": (
        ["grow=deeper", "grow.at_epochs=[2]", "grow.where=[stages.7]"],
        ["grow.where=['stages.7']", "there are stages.0.0"],
    ),
    "no target": (["model=custom"], ["model._target_: missing"]),
    "missing package": (
        ["model=custom", "model._target_=my_package.Net"],
        ["model._target_=my_package.Net", "no module my_package", "current directory"],
    ),
    "mistyped network": (
        ["model=torchvision", "model.name=densnet121"],
        ["model.name=densnet121", "did you mean densenet121"],
    ),
    "images too small": ([*ANY_MODEL, "model=alexnet", "model.stem=imagenet"], ["model=alexnet", "(3, 8, 8)"]),
    "missing data set": (
        ["data=cifar10", "data.root=nowhere", "data.download=false"],
        ["data.root=nowhere", "CIFAR10", "data.download=false"],
    ),
    "no such folder": (["data=image_folder", "data.root=nowhere"], ["data.root=nowhere", "train/<class>/"]),
    "no network": (["data=cifar10", "data.root=nowhere"], ["data.root=nowhere", "download failed"]),
    "batch above the data": ([*SMALL, "batch_policy.batch_size=999"], ["batch_policy.batch_size=999", "256"]),
    "limit above the data": (
        [*SMALL, "batch_policy=adabatch", "batch_policy.max_batch_size=257"],
        ["batch_policy.max_batch_size=257", "256"],
    ),
    "free memory of a CPU": (
        [*SMALL, "batch_policy=fill_memory", "device=cpu"],
        ["batch_policy.budget=null", "batch_policy.budget=2GiB"],
    ),
    "single images of one pixel": (
        [*SMALL, "model.stages=4", "data.train_samples=257"],
        ["batch_policy.batch_size=16", "a single one", "more than 1 value per channel"],
    ),
    "no batch norm": (
        [*ANY_MODEL, "model=alexnet", "norm=ghost"],
        ["norm=ghost: the model has no BatchNorm2d"],
    ),
    "model too small to prune": ([*SMALL, "model.width=1", "model.stages=1"], ["prune.min_channels=1", "wider"]),
    "no norms": (
        [*ANY_MODEL, "prune=morphnet", "model=vgg8", "model.batch_norm=false", "data.image_size=32"],
        ["prune.regulariser=gamma_l1", "prune.regulariser=group_lasso"],
    ),
    "pattern without a module": ([*SMALL, "prune.ignore=[steam]"], ["prune.ignore=['steam']", "stem"]),
    "attention": (
        [
            *("data=synthetic", "data.image_size=32", "model=torchvision", "model.name=vit_b_16", "prune=prunetrain"),
            "+model.options.image_size=32",
        ],
        ["MultiheadAttention", "self_attention", "prune.ignore"],
    ),
    "missing checkpoint": (["resume=nowhere.pt"], ["nowhere.pt", "no such checkpoint"]),
    "divergence": ([*SMALL, "optimizer.lr=1e30", "prune=none", "schedule.warmup_epochs=0"], ["optimizer.lr=1e+30"]),
}

# Without a network a request fails at once; this keeps it so where there is one.
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}


def check_failure(result: subprocess.CompletedProcess[str], parts: list[str]) -> None:
    said = result.stdout + result.stderr
    assert result.returncode != 0, said
    assert "Traceback" not in said, said
    for part in parts:
        assert part in said, said
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) <= 12, said


@pytest.mark.parametrize("case", {**CASES, **SLOWER_CASES})
def test_a_mistake_is_named(case: str, command: Command, tmp_path: Path) -> None:
    overrides, parts = {**CASES, **SLOWER_CASES}[case]
    # What an override replaces must not be given first: prune=none drops the keys of prunetrain.
    if "prune=none" in overrides:
        overrides = [o for o in overrides if not o.startswith(("prune.", "prune=prunetrain"))]
    result = command("tracking=none", *overrides, env=OFFLINE)
    check_failure(result, parts)
    left = {path.name for path in tmp_path.rglob("*")} - {"nowhere"}
    assert left <= {"outputs", *(p.name for p in (tmp_path / "outputs").glob("*"))}, left


def test_a_mistake_in_a_multirun_is_named(command: Command) -> None:
    result = command("-m", "epochs=0,1", "tracking=none")
    check_failure(result, ["epochs=0"])


def test_damaged_and_foreign_checkpoints_are_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    check_failure(command("resume=text.pt"), ["text.pt", "not a checkpoint"])
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "foreign.pt")
    check_failure(command("resume=foreign.pt"), ["foreign.pt", "not a checkpoint of MorphTrain"])
    torch.save(Path("/code"), tmp_path / "pickled.pt")
    check_failure(command("resume=pickled.pt"), ["pickled.pt", "not a checkpoint of MorphTrain"])


def test_a_read_only_place_is_named(command: Command, tmp_path: Path) -> None:
    """A run directory below a file cannot be made, whoever runs the test; root may write where chmod forbids it."""
    (tmp_path / "file").write_text("")
    check_failure(command(*SMALL, "tracking=none", "hydra.run.dir=file/run"), ["file/run", "hydra.run.dir"])


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
from morphtrain.run import main
main()
"""


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the same write fails, with another number."""
    here = [*SMALL, "tracking=none", "hydra.run.dir=run", "resume=auto"]
    killed = subprocess.run([sys.executable, KILLED_RUN, "step:70", *here], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = tmp_path / "run" / "last.pt"
    before = checkpoint.read_bytes()
    for place in ("run", "fresh"):
        result = subprocess.run(
            [sys.executable, "-c", LIMITED, *here, f"hydra.run.dir={place}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        check_failure(result, ["last.pt", "File too large", "hydra.run.dir"])
    assert checkpoint.read_bytes() == before
    assert not list((tmp_path / "fresh").glob("*.pt*"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_run_directory_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    here = [*SMALL, "tracking=none", "hydra.run.dir=run", "epochs=2"]
    assert command(*here).returncode == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    check_failure(command(*here), ["hydra.run.dir", "resume=auto"])
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_resuming_with_another_config_is_refused(command: Command) -> None:
    here = [*SMALL, "tracking=none", "hydra.run.dir=run", "epochs=2"]
    assert command(*here).returncode == 0
    result = command(*here, "resume=auto", "optimizer.lr=0.01")
    check_failure(result, ["optimizer.lr=0.01", "optimizer.lr=0.1", "resume=never"])


def test_help_and_config_are_fast_because_they_import_little(command: Command) -> None:
    for flag in (["--help"], ["--cfg", "job"]):
        result = command(*flag, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert result.returncode == 0
        imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "|" in line}
        assert "hydra" in imported
        assert not imported & {"torch", "mlflow", "optuna", "numpy", "rich"}
