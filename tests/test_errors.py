"""What a user gets wrong gives a short message that names it, a non-zero exit code, and nothing left behind."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Answer, Command, Kill
from fork_server import ForkServer

from morphtrain.schema import names

ANY_MODEL = [override for override in SMALL if not override.startswith("model.")]  # without the keys of a ResNet

# What is typed, and the whole of what is answered.
CASES = {
    "mistyped option": (["prune=prunetrian"], "prune=prunetrian: no such option; did you mean prunetrain?"),
    "mistyped option of Hydra's": (
        ["hydra/sweeper=morphtrian"],
        "hydra/sweeper=morphtrian: no such option; did you mean morphtrain?",
    ),
    "mistyped preset": (["+sweep=prune"], "sweep=prune: no such option; did you mean prunetrain?"),
    "quite another option": (
        ["prune=half"],
        "prune=half: no such option; there are custom, early, morphnet, none, prunetrain",
    ),
    "another name of a format": (["precision=fp16"], "precision=fp16: no such option; did you mean o1?"),
    "a format by its bits": (["precision=32"], "precision=32: no such option; did you mean o0?"),
    "no option": (["prune="], "prune=: no such option; there are custom, early, morphnet, none, prunetrain"),
    "null as option": (
        ["prune=null"],
        "prune=null: no such option; there are none, prunetrain, morphnet, early, custom",
    ),
    "number as option": (["norm=3"], "norm=3: no such option; there are batch, sync, ghost, weight, custom"),
    "group left out": (["~prune"], "prune: missing; give it a value"),
    "network of torchvision": (
        ["model=resnet18"],
        "model=resnet18: no such option; did you mean resnet8 or resnet or resnet56; model=torchvision "
        "model.name=resnet18 takes torchvision's networks, model=custom your own",
    ),
    "mistyped group": (["prun=prunetrain"], "prun=prunetrain: no such key; did you mean prune?"),
    "mistyped key": (
        ["prune=prunetrain", "prune.laso_ratio=0.2"],
        "prune.laso_ratio=0.2: the chosen option of prune has no such key; did you mean prune.lasso_ratio or "
        "prune.lasso_ratio_of?",
    ),
    "key of another option": (
        ["prune.lasso_ratio=0.5"],
        "prune.lasso_ratio=0.5: the chosen option of prune has no such key; add prune=prunetrain or prune=morphnet",
    ),
    "added key of another option": (
        ["+prune.strength=1", "prune=prunetrain"],
        "prune.strength=1: the chosen option of prune has no such key; add prune=morphnet",
    ),
    "target without custom": (
        ["data._target_=mine.Data"],
        "data._target_=mine.Data: the chosen option of data has no such key; add data=custom",
    ),
    "key of one's own part": (
        ["model=custom", "model._target_=a.B", "model.colours=3"],
        "model.colours=3: the chosen option of model has no such key; --help shows its keys; a keyword of a part of "
        "your own is added by +model.colours=3",
    ),
    "mistyped top-level key": (["epoch=3"], "epoch=3: no such key; did you mean epochs?"),
    "key of a group without it": (["infobatch=0.5"], "infobatch=0.5: no such key; did you mean data.infobatch?"),
    "added top-level key": (["+epoch=3"], "epoch=3: no such key; did you mean epochs?"),
    "key of another group": (
        ["data.batch_size=32"],
        "data.batch_size=32: the chosen option of data has no such key; did you mean batch_policy.batch_size? A "
        "keyword of a part of your own is added by +data.batch_size=32",
    ),
    "trainer's key": (["trainer.max_epochs=3"], "trainer.max_epochs=3: no such key; did you mean epochs?"),
    "trainer's key with another name here": (
        ["trainer.devices=2"],
        "trainer.devices=2: no such key; did you mean processes?",
    ),
    "trainer's group": (["logger=wandb"], "logger=wandb: no such key; did you mean tracking?"),
    "key of a callback": (
        ["callbacks.early_stopping.patience=3"],
        "callbacks.early_stopping.patience=3: no such key; did you mean methods?",
    ),
    "group without its plus": (
        ["experiment=lasso_ratio"],
        "experiment=lasso_ratio: no run has this group by itself; +experiment=lasso_ratio adds it",
    ),
    "unknown key of Hydra's": (["hydra.foo=1"], "hydra.foo=1: no such key"),
    "mistyped key of Hydra's": (["hydra.run.dri=x"], "hydra.run.dri=x: no such key; did you mean hydra.run.dir?"),
    "mistyped node of Hydra's": (
        ["hydra.swep.dir=x"],
        "hydra.swep.dir=x: no such key; did you mean hydra.sweep or hydra.sweeper?",
    ),
    "key of the sweeper without one": (
        ["hydra.sweeper.n_trials=3"],
        "hydra.sweeper.n_trials=3: no such key; add hydra/sweeper=morphtrain, or a preset with +sweep=",
    ),
    "mistyped key of the sweeper": (
        ["+sweep=prunetrain", "hydra.sweeper.n_trails=3"],
        "hydra.sweeper.n_trails=3: no such key; did you mean hydra.sweeper.n_trials?",
    ),
    "key of a launcher without one": (
        ["hydra.launcher.n_jobs=2"],
        "hydra.launcher.n_jobs=2: no such key; add +launcher=joblib",
    ),
    "mistyped key of a launcher": (
        ["+launcher=joblib", "hydra.launcher.n_job=2"],
        "hydra.launcher.n_job=2: no such key; did you mean hydra.launcher.n_jobs?",
    ),
    "several values in a single run": (
        ["seed=1,2"],
        "seed=1,2: several values need -m, which runs one job for each; a list is seed=[1,2]",
    ),
    "key that an option of a grid lacks": (
        ["-m", "prune=none,prunetrain", "prune.start_epoch=2"],
        "prune.start_epoch=2: all jobs of a grid get the same keys, and prune=none has none of that name; give it a "
        "command of its own",
    ),
    "added key that an option of a grid lacks": (
        ["-m", "model=resnet20,vgg8", "++model.blocks=1"],
        "++model.blocks=1: all jobs of a grid get the same keys, and model=vgg8 has none of that name; give it a "
        "command of its own",
    ),
    "key with dashes": (["--epochs=3"], "--epochs=3: no such flag; keys are typed without dashes, as epochs=3"),
    "key with dashes and a space": (
        ["--clip-norm", "3"],
        "--clip-norm: no such flag; keys are typed without dashes, as clip_norm=...",
    ),
    "key of a group with a dash": (
        ["-optimizer.lr=3"],
        "-optimizer.lr=3: no such flag; keys are typed without dashes, as optimizer.lr=3",
    ),
    "mistyped flag": (["--hepl"], "--hepl: no such flag; did you mean --help?"),
    "mistyped metric": (
        ["objective=[train_secods]"],
        "objective=train_secods: no such metric; did you mean train_seconds or train_loss or data_seconds?",
    ),
    "no name of a study": (
        ["+sweep=batch", "hydra.sweeper.study_name=null"],
        "hydra.sweeper.study_name=null: must be text",
    ),
    "empty name of a study": (
        ["+sweep=batch", "hydra.sweeper.study_name="],
        "hydra.sweeper.study_name=: must be a name, by which the study is found again",
    ),
    "no value": (
        ["epochs"],
        "epochs: cannot be read (missing EQUAL at '<EOF>'); key=value works, with quotes around other characters",
    ),
    "open bracket": (
        ["optimizer.lr=[1,"],
        "optimizer.lr=[1,: cannot be read (no viable alternative at input '[1,'); key=value works, with quotes around "
        "other characters",
    ),
    "interpolation": (["seed=${sed}"], "seed: interpolation key 'sed' not found"),
    "interpolation in a group": (["optimizer.lr=${rate}"], "optimizer.lr: Interpolation key 'rate' not found"),
    "text for a whole number": (["model.width=wide"], "model.width=wide: must be a whole number"),
    "text for a number": (["optimizer.lr=a"], "optimizer.lr=a: must be a number"),
    "fraction for a whole number": (["epochs=1.5"], "epochs=1.5: must be a whole number"),
    "nothing for a number": (["optimizer.lr="], "optimizer.lr=: must be a number"),
    "null for a number": (["seed=null"], "seed=null: must be a whole number"),
    "number for true": (["optimizer.nesterov=2"], "optimizer.nesterov=2: must be true or false"),
    "node for a number": (["model.width={a: 1}"], "model.width={'a': 1}: must be a whole number"),
    "fraction in a list": (
        ["grow=wider", "grow.at_epochs=[1.5]"],
        "grow.at_epochs=[1.5]: must be a list, as [1,2] or [25%]",
    ),
    "number for a list": (["grow=wider", "grow.at_epochs=3"], "grow.at_epochs=3: must be a list, as [1,2] or [25%]"),
    "share for a list": (["grow=wider", "grow.at_epochs=9%"], "grow.at_epochs=9%: must be a list, as [1,2] or [25%]"),
    "text for an optional number": (["clip_norm=long"], "clip_norm=long: must be a number, or null"),
    "node for a list": (
        ["methods={_target_: a.B}"],
        "methods={_target_: a.B}: must be of the kind that it replaces: a value, a list in [], or {key: value}",
    ),
    "infinite": (["optimizer.weight_decay=inf"], "optimizer.weight_decay=inf: must be a number, and finite"),
    "infinite optional": (["clip_norm=inf"], "clip_norm=inf: must be a number, or null, and finite"),
    "infinite in a list": (
        ["optimizer=adamw", "optimizer.betas=[0.9,nan]"],
        "optimizer.betas=[0.9, nan]: must be a list, as [0.5,0.9], and finite",
    ),
    "ratio 1.5": (
        ["prune=prunetrain", "prune.lasso_ratio=1.5", "prune.lasso_ratio_of=loss"],
        "prune.lasso_ratio=1.5: must be above 0 and below 1, with prune.lasso_ratio_of=loss",
    ),
    "no ratio": (
        ["prune=prunetrain", "prune.lasso_ratio=0"],
        "prune.lasso_ratio=0.0: must be above 0 (usual: 2 to 16), with prune.lasso_ratio_of=initial_norm",
    ),
    "ratio of what": (
        ["prune=prunetrain", "prune.lasso_ratio_of=norm"],
        "prune.lasso_ratio_of=norm: must be one of initial_norm, loss",
    ),
    "threshold -1": (
        ["prune=prunetrain", "prune.threshold=-1"],
        "prune.threshold=-1.0: must be above 0 (the thesis: 1e-5 to 1e-1)",
    ),
    "residual": (["prune=prunetrain", "prune.residual=both"], "prune.residual=both: must be one of union, gating"),
    "rounding": (
        ["prune=prunetrain", "prune.round_to=best"],
        "prune.round_to=best: must be 1 or more channels, or auto",
    ),
    "rounding down": (
        ["prune=prunetrain", "prune.round_down=0.1"],
        "prune.round_down=0.1: must be 0 with prune.round_to=1; prune.round_to=auto allows it",
    ),
    "no time to grow": (
        ["grow=wider"],
        "grow.at_epochs=[]: must be at least one epoch, unless grow.patience is a number",
    ),
    "growth after the end": (
        ["grow=wider", "grow.at_epochs=[60]"],
        "grow.at_epochs=[60]: must be before the last epoch (epochs=60)",
    ),
    "growth after the whole run": (
        ["grow=wider", "grow.at_epochs=[100%]"],
        "grow.at_epochs=[60]: must be before the last epoch (epochs=60)",
    ),
    "more than the run": (
        ["prune=prunetrain", "prune.start_epoch=120%"],
        "prune.start_epoch=120%: must be above 0% and at most 100%, as a share of the run",
    ),
    "a share that is none": (
        ["prune=prunetrain", "prune.start_epoch=x%"],
        "prune.start_epoch=x%: must be a whole number, or a share of the run, as 25%",
    ),
    "a share of a further method": (
        ["methods=[{_target_:morphtrain.options.method,option:grow/deeper,at_epochs:[0%]}]"],
        "methods[0].at_epochs=0%: must be above 0% and at most 100%, as a share of the run",
    ),
    "backwards": (
        ["grow=wider", "grow.at_epochs=[2]", "grow.new_lr_factor=-1"],
        "grow.new_lr_factor=-1.0: must be 0 or more; 1 is as all else",
    ),
    "never back": (
        ["grow=wider", "grow.at_epochs=[2]", "grow.new_lr_epochs=0"],
        "grow.new_lr_epochs=0.0: must be above 0 epochs",
    ),
    "a rate of its own for all": (
        ["grow=morphnet", "prune=prunetrain", "prune.stop_epoch=10", "grow.inherit=false", "grow.new_lr_factor=2"],
        "grow.new_lr_factor=2.0: must be 1 with grow.inherit=false: all weights are new then",
    ),
    "factor 1": (["grow=wider", "grow.at_epochs=[2]", "grow.factor=1"], "grow.factor=1.0: must be above 1"),
    "even kernel": (["grow=deeper", "grow.at_epochs=[2]", "grow.kernel=4"], "grow.kernel=4: must be odd"),
    "selective without pruning": (
        ["grow=selective", "grow.at_epochs=[2]"],
        "grow=selective with prune=none methods=[]: it grows a network that another method has shrunk; "
        "prune=prunetrain or prune=morphnet works",
    ),
    "ghosts of no norms": (
        ["model=alexnet", "norm=ghost"],
        "norm=ghost with model.batch_norm=false: the model has no batch norm to replace; model.batch_norm=true or "
        "norm=batch works",
    ),
    "pruning after the last round": (
        ["grow=morphnet", "prune=prunetrain"],
        "prune.stop_epoch=null: must be grow.rounds * grow.round_epochs = 10 or earlier, or what grew would be shrunk "
        "again",
    ),
    "rounds after the end": (
        ["grow=morphnet", "prune=prunetrain", "grow.rounds=6", "prune.stop_epoch=60"],
        "grow.rounds=6: must be fewer: the last round ends after epoch 60, which must be before epochs=60",
    ),
    "accuracies": (
        ["grow=adaptive", "grow.high_accuracy=0.5"],
        "grow.high_accuracy=0.5: must be 0.9 (grow.low_accuracy) to 1",
    ),
    "ratio and strength": (
        ["prune=morphnet", "prune.strength=1e-8"],
        "prune.lasso_ratio=4.0: must be null when prune.strength=1e-08 is given",
    ),
    "neither of them": (
        ["prune=morphnet", "prune.lasso_ratio=null"],
        "prune.lasso_ratio=null: must be above 0 (usual: 2 to 16), with prune.lasso_ratio_of=initial_norm (or null, "
        "with prune.strength given)",
    ),
    "cost": (["prune=morphnet", "prune.cost=params"], "prune.cost=params: must be one of flops, model_size, latency"),
    "rounding by the clock": (["prune=morphnet", "prune.round_to=auto"], "prune.round_to=auto: must be a whole number"),
    "trial of no study": (
        ["+sweep=prunetrain", "trial=1"],
        "trial=1: must be null; hydra/sweeper=morphtrain numbers its trials",
    ),
    "zero epochs": (["epochs=0"], "epochs=0: must be 1 or more"),
    "zero blocks": (
        ["model.blocks=0"],
        "model.blocks=0: must be a whole number of 1 or more, or a list of 3 such numbers (model.stages=3)",
    ),
    "blocks and stages": (
        ["model.blocks=[1,2]"],
        "model.blocks=[1, 2]: must be a whole number of 1 or more, or a list of 3 such numbers (model.stages=3)",
    ),
    "shortcut": (["model.shortcut=C"], "model.shortcut=C: must be one of A, B"),
    "bottleneck": (["model.bottleneck=true"], "model.layers=2: must be 3 or more"),
    "learning rate": (["optimizer.lr=0"], "optimizer.lr=0.0: must be above 0"),
    "a metric twice": (["objective=[macs,macs]"], "objective=['macs', 'macs']: must be different metrics"),
    "milestones": (
        ["schedule=milestones", "schedule.milestones=[60,80]"],
        "schedule.milestones=[60.0, 80.0]: must be rising fractions of the run, between 0 and 1",
    ),
    "resize below the crop": (
        ["data=image_folder", "data.image_size=64", "data.resize=32"],
        "data.resize=32: must be auto, or 64 (data.image_size) or more pixels",
    ),
    "in memory perhaps": (
        ["data=image_folder", "data.in_memory=maybe"],
        "data.in_memory=maybe: must be auto, or true or false",
    ),
    "a size without a unit": (
        ["data=image_folder", "data.memory_limit=1GX"],
        "data.memory_limit=1GX: must be auto, a number of GiB (0 or more), or a size with its unit, as 512MiB",
    ),
    "unknown device": (["device=gpu"], "device=gpu: must be auto, cpu, cuda, cuda:N or mps"),
    "password": (
        ["tracking=mlflow", "tracking.uri=http://me:hush@host"],
        "tracking.uri=http://me:***@host: must be an address without a password, since every file of a run would show "
        "it; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment give it to a server, and "
        "MLFLOW_TRACKING_URI with tracking.uri=null is used as it is and never written down",
    ),
    "no range to search": (
        ["-m", "hydra/sweeper=morphtrain", "optimizer.lr=tag(log,interval(0,0.1))"],
        "optimizer.lr=tag(log,interval(0,0.1)): cannot be searched: `low > 0` must hold for `log=True`, but got "
        "(low=0.0, high=0.1).",
    ),
    "no range at all": (
        ["-m", "hydra/sweeper=morphtrain", "model.width=range(4,4)"],
        "model.width=range(4,4): cannot be searched: An Optuna range sweep must contain at least one value.",
    ),
    "text for the number of trials": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.n_trials=many", "model.width=4,6"],
        "hydra.sweeper.n_trials=many: must be a whole number",
    ),
    "heartbeats for ever": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.heartbeat_seconds=inf", "model.width=4,6"],
        "hydra.sweeper.heartbeat_seconds=inf: must be a number, and finite",
    ),
    "a failure rate of 2": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.max_failure_rate=2", "model.width=4,6"],
        "hydra.sweeper.max_failure_rate=2.0: must be a share, 0 to 1",
    ),
    "number for a baseline": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.baseline=3", "model.width=4,6"],
        "hydra.sweeper.baseline=3: must be a list, as [name,other], or null",
    ),
    "no search space": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.custom_search_space=mine.space"],
        "hydra.sweeper.custom_search_space=mine.space: Error loading 'mine.space': ModuleNotFoundError(\"No module "
        "named 'mine'\") Are you sure that module 'mine' is installed?",
    ),
    "no direction": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.direction=up", "model.width=4,6"],
        "hydra.sweeper.direction=up: must be one of minimize, maximize",
    ),
    "direction that is no text": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.direction=true", "model.width=4,6"],
        "hydra.sweeper.direction=true: must be one of minimize, maximize",
    ),
    "baseline that overrides nothing": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.baseline=[1]", "model.width=4,6"],
        "hydra.sweeper.baseline=['1']: must be a list of overrides, as [optimizer.lr=0.1], or null",
    ),
    "search space that is no node": (
        ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.params=much", "model.width=4,6"],
        "hydra.sweeper.params=much: must be keys with values, as {key: value}",
    ),
    "attempts that are no number": (
        ["+experiment=lasso_ratio", "hydra.sweeper.attempts=often"],
        "hydra.sweeper.attempts=often: must be a whole number",
    ),
    "arms that are no node": (
        ["+experiment=lasso_ratio", "hydra.sweeper.arms=both"],
        "hydra.sweeper.arms=both: must be keys with values, as {key: value}",
    ),
    "size of no experiment": (
        ["+size=medium"],
        "size=medium: is that of an experiment, as +experiment=recipe size=medium",
    ),
    "experiment without sizes": (
        ["+experiment=lasso_ratio", "hydra.sweeper.sizes=null"],
        "hydra.sweeper.sizes=null: must be keys with values, as {key: value}",
    ),
    "question without a question mark": (
        ["+experiment=lasso_ratio", "hydra.sweeper.question=much"],
        "hydra.sweeper.question=much: must be one sentence that ends in a question mark",
    ),
}

# Hydra announces a job of a multirun in lines of its own.
MULTIRUNS = {
    "trial of a plain multirun": (
        ["-m", "hydra.sweep.dir=outputs", "trial=1"],
        ["trial=1: must be null", "hydra/sweeper=morphtrain"],
    ),
    "wrong in one job": (["-m", "epochs=0,1"], ["epochs=0: must be 1 or more"]),
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
        [*ANY_MODEL, "model=torchvision", "model.name=squeezenet1_1", "norm=ghost", "data.image_size=32"],
        ["norm=ghost: the model has no BatchNorm2d"],
    ),
    "model too small to prune": ([*SMALL, "model.width=1", "model.stages=1"], ["prune.min_channels=1", "wider"]),
    "no norms": (
        [*ANY_MODEL, "prune=morphnet", "model=torchvision", "model.name=squeezenet1_1", "data.image_size=32"],
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
    "a network that asserts": (
        [*("data=synthetic", "data.image_size=32", "model=torchvision", "model.name=vit_b_16")],
        ["model=vit_b_16: cannot take images of (3, 32, 32)", "AssertionError: Wrong image height"],
    ),
    "missing checkpoint": (["resume=nowhere.pt"], ["nowhere.pt", "no such checkpoint"]),
    "divergence": ([*SMALL, "optimizer.lr=1e30", "prune=none", "schedule.warmup_epochs=0"], ["optimizer.lr=1e+30"]),
}

# Directories of the day, which may be another one at the end of a test.
DATES = {f"{datetime.date.today() + datetime.timedelta(days)}" for days in (0, 1)}

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


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_answered_in_one_line(
    case: str, answer: Answer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, line = CASES[case]
    assert answer("tracking=none", *overrides) == line
    assert "\n" not in line
    assert capfd.readouterr().err == ""
    assert {path.name for path in tmp_path.rglob("*")} <= {"outputs", "multirun", *DATES}


def test_the_command_prints_the_line_and_nothing_else(fresh_command: Command) -> None:
    result = fresh_command("tracking=none", "epochs=0", env={"HYDRA_FULL_ERROR": "0"})
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "epochs=0: must be 1 or more\n")
    full = fresh_command("tracking=none", "epochs=0", env={"HYDRA_FULL_ERROR": "1"})
    assert full.returncode == 1
    assert "Traceback" in full.stderr and "schema/config.py" in full.stderr


@pytest.mark.parametrize("case", {**MULTIRUNS, **SLOWER_CASES})
def test_a_mistake_is_named(case: str, command: Command, tmp_path: Path) -> None:
    overrides, parts = {**MULTIRUNS, **SLOWER_CASES}[case]
    # What an override replaces must not be given first: prune=none drops the keys of prunetrain.
    if "prune=none" in overrides:
        overrides = [o for o in overrides if not o.startswith(("prune.", "prune=prunetrain"))]
    result = command("tracking=none", *overrides, env=OFFLINE)
    check_failure(result, parts)
    if case in MULTIRUNS:
        return  # Hydra announces a job that fails, and goes on with the others
    assert result.stderr.count("\n") == 1, result.stderr
    left = {path.name for path in tmp_path.rglob("*")}
    assert left <= {"outputs", "multirun", *DATES}, left


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


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(
    kill: Kill, fork_server: ForkServer, tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk: the same write fails, with another number."""
    here = [*SMALL, "tracking=none", "hydra.run.dir=run", "resume=auto"]
    kill("step:70", *here)
    checkpoint = tmp_path / "run" / "last.pt"
    before = checkpoint.read_bytes()
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    for place in ("run", "fresh"):
        result = fork_server.run([str(script), *here, f"hydra.run.dir={place}"], tmp_path)
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


def test_help_and_config_are_fast_because_they_import_little(fresh_command: Command) -> None:
    for flag in (["--help"], ["--cfg", "job"]):
        result = fresh_command(*flag, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert result.returncode == 0
        imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "|" in line}
        assert "hydra" in imported
        assert not imported & {"torch", "mlflow", "optuna", "numpy", "rich"}


HELP = """
epochs: 60                  # passes over the training data
prune=prunetrain   (there are custom, early, morphnet, none, prunetrain)
  # PruneTrain (Lym et al. 2019, arXiv 1901.09290): group lasso while training; dead channels are removed along the way.
  lasso_ratio: 0.5       # strength of the penalty, as a ratio of what the next key names; fixes lambda
  interval: 5          # epochs from one reconfiguration to the next (the paper: 10 on CIFAR, 5 on ImageNet)
model=resnet20   (there are
  blocks: 3
  root: pictures
"""


FROM_TABLES = ("data=hf", "data.root=pictures")  # a key without a default


def test_help_explains_the_keys_of_the_command_line(command: Command) -> None:
    result = command(
        "--help", "prune=prunetrain", "prune.lasso_ratio=0.5", "model=resnet20", "grow=wider", *FROM_TABLES
    )
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    for line in HELP.strip().splitlines():
        assert any(shown.startswith(line) for shown in lines), line
    for group in ("model", "prune", "data", "grow", "optimizer", "tracking"):
        option = {"model": "resnet", "prune": "prunetrain", "data": "hf", "grow": "wider"}.get(group)
        for key in names.keys(group, option) if option else ():
            assert any(shown.startswith(f"  {key}:") for shown in lines), f"{group}.{key}"
    assert "hydra:" not in result.stdout
