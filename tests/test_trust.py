"""What others can write - a study, a directory they sent - decides neither what runs here nor where anything goes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from os import system as renamed  # noqa: F401 (a `_target_`)
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import SMALL, Command
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from test_errors import check_failure
from torch import nn

import morphtrain
from morphtrain import contracts, options, schema
from morphtrain.data import ImageData
from morphtrain.errors import UserError
from morphtrain.model import ResNet
from morphtrain.sweep.search_space import SearchSpace
from morphtrain.sweep.workers import abandoned
from morphtrain.tracking import __main__ as command_line
from morphtrain.tracking import unsent
from morphtrain.tracking.unsent import Record
from morphtrain.trainer.build import build_run

TINY = (
    *("data=synthetic", "data.train_samples=64", "data.val_samples=64", "data.image_size=8"),
    *("model.blocks=1", "model.stages=1", "epochs=1", "timing.reference=0", "tracking=none"),
)
SEARCHED = {"optimizer.lr": FloatDistribution(0.05, 0.1), "model.width": IntDistribution(4, 6)}
BAD = {"model": "custom", "model._target_": "os.system", "+model.command": "touch stolen"}


def test_a_study_decides_the_values_of_searched_keys_and_nothing_else(command: Command, tmp_path: Path) -> None:
    fixed = [*TINY, "batch_policy.batch_size=16"]
    storage = f"sqlite:///{tmp_path}/optuna.db"
    study = optuna.create_study(study_name="sweep", storage=storage)
    facts = {"directions": ["minimize"], "objective": ["train_seconds"], "overrides": fixed, "baseline": None}
    study.set_user_attr("facts", facts)
    within = {"optimizer.lr": 0.07, "model.width": 5}
    study.enqueue_trial({**within, **BAD}, user_attrs={"run_dir": f"{tmp_path}/elsewhere/0", "worker_lock": "/dev/tty"})
    bad = {key: CategoricalDistribution([value]) for key, value in BAD.items()}
    study.add_trial(create_trial(state=TrialState.WAITING, params={**within, **BAD}, distributions={**SEARCHED, **bad}))
    for lr in (0.9, "${oc.env:HOME}", "0.07 model=custom"):
        study.enqueue_trial({**within, "optimizer.lr": lr})
    stored = {"overrides": ["model=custom", "model._target_=os.system"]}
    study.add_trial(create_trial(value=0.0, params=within, distributions=SEARCHED, user_attrs=stored))

    sweep = ["-m", "hydra/sweeper=morphtrain", "hydra.sweeper.baseline=null", "hydra.sweeper.n_trials=6"]
    ranges = ["optimizer.lr=interval(0.05,0.1)", "model.width=range(4,7)", "hydra.sweeper.max_failure_rate=1"]
    result = command(*sweep, "hydra.sweeper.repeat=true", "hydra.sweep.dir=sweep", *fixed, *ranges)
    assert result.returncode == 0, result.stdout + result.stderr
    trials = optuna.load_study(study_name="sweep", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2 + ["FAIL"] * 3 + ["COMPLETE"]
    for trial in trials[:2]:
        assert trial.user_attrs["overrides"] == [*fixed, "optimizer.lr=0.07", "model.width=5"]
        assert trial.user_attrs["run_dir"] == str(tmp_path / "sweep" / str(trial.number))
    for trial in trials[2:5]:
        assert "\n" not in trial.user_attrs["error"]
        assert "not searched" in trial.user_attrs["error"] or "what this sweep searches" in trial.user_attrs["error"]
    (again,) = (line for line in result.stdout.splitlines() if line.startswith("to run the best trial again:"))
    assert again.endswith("optimizer.lr=0.07 model.width=5"), "which is not what the study says it ran with"
    assert not list(tmp_path.rglob("stolen"))
    assert not (tmp_path / "elsewhere").exists()


def test_what_ones_own_search_space_suggests_is_asked_again() -> None:
    def extend(config: object, trial: optuna.Trial) -> None:
        if trial.suggest_categorical("prune", ["none", "prunetrain"]) == "prunetrain":
            trial.suggest_float("prune.lasso_ratio", 0.1, 0.8)

    study = optuna.create_study()
    space = SearchSpace(["optimizer.lr=interval(0.05,0.1)"], extend, None)  # type: ignore[arg-type]
    study.enqueue_trial({"optimizer.lr": 0.06, "prune": "none", "prune.lasso_ratio": 0.3, **BAD})
    assert space.suggest(study.ask()) == ["optimizer.lr=0.06", "prune=none"]
    study.enqueue_trial({"optimizer.lr": 0.06, "prune": "prunetrain", "prune.lasso_ratio": 0.9})
    with pytest.raises(UserError, match=r"prune\.lasso_ratio=0\.9: must be what this sweep searches"):
        space.suggest(study.ask())
    study.enqueue_trial({"optimizer.lr": 0.06, "prune": "custom"})
    with pytest.raises(UserError, match="custom"):
        space.suggest(study.ask())


@pytest.mark.parametrize("attrs", [{"worker_lock": 3}, {"worker_lock": "/dev/tty"}, {"heartbeat": "now"}])
def test_a_strange_worker_of_a_study_is_a_dead_one(attrs: dict[str, object]) -> None:
    assert abandoned(attrs, heartbeat_seconds=30)


def test_a_sampler_that_keeps_pickles_in_the_study_is_refused(command: Command) -> None:
    result = command("-m", "hydra/sweeper=morphtrain", "hydra/sweeper/sampler=cmaes", "seed=1,2", "tracking=none")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("hydra/sweeper/sampler=cmaes: ")


# -- what a `_target_` may be ---------------------------------------------------------------------------------------

half = functools.partial(os.system, "touch stolen")
called: list[str] = []


class Wanting:
    """No part of anything, though it can be made from anything, and called."""

    def __init__(self, **keywords: object) -> None:
        called.append("class")

    def __call__(self) -> None: ...


def says_wrongly(**keywords: object) -> Wanting:
    called.append("function")
    return Wanting()


def says_nothing(**keywords: object) -> None:
    called.append("procedure")


@functools.wraps(shutil.rmtree)
def decorated(**keywords: object) -> None:
    called.append("decorated")


@functools.lru_cache
def cached(num_classes: int, in_channels: int) -> nn.Module:
    return small(num_classes, in_channels)


def small(num_classes: int, in_channels: int, width: int = 4) -> Any:
    return ResNet(stages=1, blocks=1, width=width, num_classes=num_classes, in_channels=in_channels)


def in_words(num_classes: int, in_channels: int) -> "NoName | ResNet":  # type: ignore[name-defined]  # noqa: F821, UP037
    return small(num_classes, in_channels)


slim = functools.partial(small, width=2)
DENSE = [override for override in SMALL if not override.startswith(("prune", "model"))]
NOT_CALLED = ("builtins.exit", "builtins.exec", "os.system", "subprocess.Popen", "antigravity.fly", "pathlib.Path")
NOT_CALLED += tuple(f"test_trust.{name}" for name in ("renamed", "half", "decorated", "Wanting", "says_wrongly"))
NOT_CALLED += ("test_trust.says_nothing", "torch._C._log_api_usage_once", "torch.Generator")
GROUPS = ("model", "data", "prune", "optimizer", "precision", "tracking", "methods", "loss")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("target", NOT_CALLED)
def test_what_cannot_be_a_part_is_refused_before_it_is_called(
    group: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if group == "loss" and target in ("test_trust.Wanting", "test_trust.says_wrongly"):
        pytest.skip("it can be called, so it may be a loss")
    calls: list[Any] = []
    monkeypatch.setattr("morphtrain.custom.construct", lambda *given: calls.append(given))
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    called.clear()
    key = "methods[0]" if group == "methods" else group
    custom = schema.Custom(target, {})
    with pytest.raises(UserError, match=rf"^{key}._target_={target}: ".replace("[", r"\[")) as refused:
        options.build_custom(group, key, custom, model=nn.Identity())
    assert "\n" not in str(refused.value)
    assert not calls and not called
    assert "antigravity" not in sys.modules, "importing it opens a browser"


@pytest.mark.parametrize("target", ["test_trust.small", "test_trust.slim", "test_trust.cached", "test_trust.in_words"])
def test_functions_that_may_make_a_network_are_called(target: str) -> None:
    run = build_run(morphtrain.compose(*DENSE, "model=custom", f"model._target_={target}"))
    assert isinstance(run.model, ResNet)


def test_a_norm_is_no_class() -> None:
    with pytest.raises(UserError, match=r"norm\._target_=torch\.nn\.Module: is a class"):
        build_run(morphtrain.compose(*DENSE, "norm=custom", "norm._target_=torch.nn.Module"))


def test_data_that_delegates_is_made() -> None:
    assert options._may_be(contracts.Data, Delegating)
    assert options._may_be(contracts.Data, ImageData)


class Delegating:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)


EXITS = {"script": "import sys\nsys.exit(0)\n", "maker": "def Net(**keywords):\n    exit(0)\n"}


@pytest.mark.parametrize("kind", EXITS)
def test_what_exits_is_no_run_that_succeeded(kind: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(EXITS[kind])
    result = command("tracking=none", "model=custom", "model._target_=own.Net")
    check_failure(result, ["model._target_=own.Net: ", "SystemExit"])
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").rglob("*.pt"))


# -- what a directory that somebody sent decides ---------------------------------------------------------------------


class Listener:
    """A server that notes who asks, and answers nothing."""

    def __init__(self) -> None:
        self.asked = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.socket.accept()[0].close()
                self.asked += 1


def received(directory: Path, uri: str, files: list[str]) -> Path:
    """A directory as somebody else may have made it."""
    directory.mkdir(exist_ok=True)
    record = Record(uri, "e", "n", {}, {}, 5, history=[{"epoch": 1, "timestamp": 1.0, "epoch_seconds": 1.0}])
    facts = dataclasses.asdict(record) | {"artifacts": [[file, None] for file in files]}
    (directory / unsent.FILE).write_text(json.dumps(facts))
    return directory


def test_a_directory_does_not_decide_where_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    listener = Listener()
    for uri in (listener.uri, f"sqlite:///{tmp_path}/other.db", "postgresql://127.0.0.1/x", "x\x1b[2J"):
        assert command_line.main([str(received(tmp_path / "run", uri, []))]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "\x1b" not in line
        assert f"--uri {uri}" in line or "damaged" in line
    assert listener.asked == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_directory_sends_only_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    secret, run = tmp_path / "secret", tmp_path / "run"
    secret.write_text("hush")
    (run / "folder").mkdir(parents=True)
    (run / "folder" / "link").symlink_to(secret)
    (run / "up").symlink_to("..")
    for file in ("../secret", str(secret), "folder/link", "up/secret", "folder", ".", "/etc/passwd"):
        received(run, f"sqlite:///{tmp_path}/mlflow.db", [file])
        assert command_line.main([str(run)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"names {file!r}, which is no file inside" in line
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


# -- passwords -------------------------------------------------------------------------------------------------------

SECRET = "hush-4711"
ADDRESS = f"http://me:{SECRET}@127.0.0.1:9"
LITTLE = [key for key in TINY if key != "tracking=none"]


def files_with(secret: str, directory: Path) -> list[Path]:
    """Files in which a text stands, plainly or inside a checkpoint, which is an archive without compression."""
    return [path for path in directory.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


MULTIRUN = ["-m", "seed=1,2", "hydra.sweep.dir=outputs/many"]
OWN_FILE = ["--config-dir", "own", "tracking=server"]
TOLD = {
    "a run": [f"tracking.uri={ADDRESS}"],
    "a quoted one": [f"tracking.uri='{ADDRESS}'"],
    "a node": [f"tracking={{name: mlflow, uri: '{ADDRESS}'}}"],
    "an option": [f"tracking.uri=postgresql://host/db?password={SECRET}"],
    "the environment": ["tracking.uri=${oc.env:ADDRESS}"],
    "a multirun": [*MULTIRUN, f"tracking.uri={ADDRESS}"],
    "a multirun, the environment": [*MULTIRUN, "tracking.uri=${oc.env:ADDRESS}"],
    "a file": OWN_FILE,
    "a multirun, a file": [*MULTIRUN, *OWN_FILE],
    "a sweep": ["-m", "hydra/sweeper=morphtrain", "model.width=4,6", f"tracking.uri={ADDRESS}"],
}


@pytest.mark.parametrize("case", TOLD)
def test_a_password_in_the_config_is_refused_and_stays_nowhere(case: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "own" / "tracking").mkdir(parents=True)
    (tmp_path / "own" / "tracking" / "server.yaml").write_text(
        f"name: mlflow\nuri: {ADDRESS}\nexperiment: e\nflush_seconds: 1\nparent_run_id: null\n"
    )
    result = command(*LITTLE, *TOLD[case], env={"ADDRESS": ADDRESS})
    check_failure(result, ["tracking.uri=", "without a password", "MLFLOW_TRACKING_PASSWORD"])
    assert SECRET not in result.stdout + result.stderr
    assert [path.name for path in files_with(SECRET, tmp_path)] == ["server.yaml"]


STUDY = f"postgresql://me:{SECRET}@127.0.0.1:9/studies"
OF_A_STUDY = ["hydra/sweeper=morphtrain", "model.width=4,6"]
STORED = {
    "typed": [*OF_A_STUDY, f"hydra.sweeper.storage={STUDY}"],
    "as an option": [*OF_A_STUDY, f"hydra.sweeper.storage='postgresql://127.0.0.1:9/studies?password={SECRET}'"],
    "in a file": [*OF_A_STUDY, "--config-dir", "own", "+study=server"],
}


@pytest.mark.parametrize("case", STORED)
def test_a_password_of_a_study_is_refused_and_stays_nowhere(case: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "own" / "study").mkdir(parents=True)
    server = f"# @package _global_\nhydra:\n  sweeper:\n    storage: {STUDY}\n"
    (tmp_path / "own" / "study" / "server.yaml").write_text(server)
    result = command(*LITTLE, *STORED[case])
    check_failure(result, ["hydra.sweeper.storage=", "***", "without a password", "PGPASSWORD"])
    assert SECRET not in result.stdout + result.stderr
    assert [path.name for path in files_with(SECRET, tmp_path)] == ["server.yaml"]


def test_a_password_of_a_study_may_come_from_the_environment() -> None:
    schema.sweeper.check_storage("postgresql://me:${oc.env:PASSWORD}@host/studies")
    schema.sweeper.check_storage("${oc.env:STUDY}")


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_a_password_of_the_environment_is_in_no_file(sweep: bool, command: Command, tmp_path: Path) -> None:
    """Nothing answers there, so that all of it is kept for later as well."""
    searched = ["-m", "hydra/sweeper=morphtrain", "model.width=4,6", "hydra.sweeper.n_trials=2"] if sweep else []
    result = command(*LITTLE, *searched, env={"MLFLOW_TRACKING_URI": ADDRESS, "MLFLOW_TRACKING_PASSWORD": SECRET})
    assert result.returncode == 0, result.stderr
    assert "http://me:***@127.0.0.1:9" in result.stdout
    assert SECRET not in result.stdout + result.stderr
    left = list(tmp_path.rglob(unsent.FILE))
    assert len(left) == (2 if sweep else 1)
    assert not files_with(SECRET, tmp_path)
