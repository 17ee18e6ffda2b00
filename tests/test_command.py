"""`morphtrain`, the command that has all others: each is what it is as a module, under the name that was typed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL
from fork_server import ForkServer
from omegaconf import OmegaConf

import morphtrain
from morphtrain import __main__ as program
from morphtrain import schema
from morphtrain.evidence.records import read_records
from morphtrain.wording import command_name

SCRIPT = "import sys\nfrom morphtrain.__main__ import main\nsys.exit(main())\n"  # what pip writes
NOT_TYPED = {"processes", "tracking.ui_server"}  # modules that other commands start
QUICK = (*SMALL[:7], "epochs=1", "timing.reference=0")
MY_NET = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""

Form = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bin") / "morphtrain"
    path.write_text(f"#!{sys.executable}\n{SCRIPT}")
    path.chmod(0o755)
    return path


@pytest.fixture(params=["morphtrain", "python -m morphtrain"])
def form(request: pytest.FixtureRequest, script: Path, fork_server: ForkServer, tmp_path: Path) -> Form:
    """Runs the command in one of its forms, which `form.program` says."""
    start = [str(script)] if request.param == "morphtrain" else ["-m", "morphtrain"]

    def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return fork_server.run([*start, *words], tmp_path, env)

    vars(run)["program"] = request.param
    return run


def test_every_command_has_its_name() -> None:
    root = Path(program.__file__).parent
    guarded = (path for path in root.rglob("*.py") if '\nif __name__ == "__main__":' in path.read_text())
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__") for path in guarded}
    assert modules - {"__main__"} - NOT_TYPED == set(program.COMMANDS) - {"sweep"}


def test_a_run_is_that_of_the_module(form: Form, tmp_path: Path) -> None:
    """Also its network, of a module in the current directory, the name of its job and what its last line names."""
    (tmp_path / "my_nets.py").write_text(MY_NET)
    words = (*QUICK[:4], *QUICK[6:], "model=custom", "model._target_=my_nets.Net", "hydra.run.dir=run")
    result = form("run", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "epoch    1/1" in (tmp_path / "run/run.log").read_text()
    assert len(read_records(tmp_path / "run")) == 1
    stored = OmegaConf.load(tmp_path / "run/.hydra/hydra.yaml").hydra
    assert (stored.job.name, stored.job.config_name, stored.runtime.cwd) == ("run", "config", str(tmp_path))
    assert f"to compare: {form.program} ui\n" in result.stdout


def test_help_names_the_command_as_it_was_typed(form: Form) -> None:
    run = form("run", "prune=prunetrain", "--help").stdout
    assert run.startswith(f"MorphTrain: {form.program} run [group=option")
    assert "lasso_ratio:" in run
    flags = form("run", "--hydra-help").stdout
    assert f'eval "$({form.program} run -sc install=bash)"' in flags
    for name in ("report", "compare", "export"):
        assert form(name, "--help").stdout.startswith(f"usage: {form.program} {name} "), name


def test_a_mistake_ends_it_as_it_ends_the_module(form: Form) -> None:
    wrong = form("run", "epochs=0")
    assert (wrong.returncode, wrong.stderr) == (1, "epochs=0: must be 1 or more\n")
    no_flag = form("report", "--ot", "x.html")
    assert (no_flag.returncode, no_flag.stderr) == (2, "--ot: no such flag; did you mean --out?\n")
    nothing_there = form("report", "nowhere")
    assert nothing_there.returncode == 1
    assert nothing_there.stderr.startswith("nowhere: no such directory")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reprot"], "reprot: no such command; did you mean report or export?"),
        (["epochs=3", "seed=1"], "epochs=3: no such command; did you mean morphtrain run epochs=3?"),
        (["serve"], "serve: no such command; "),
        (["--verison"], "--verison: no such flag; did you mean --version?"),
        (["sweep"], "sweep: a preset is missing, as morphtrain sweep prunetrain; there are batch, "),
    ],
)
def test_what_is_no_command_is_answered_in_a_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/morphtrain", *words])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    answer = capsys.readouterr().err
    assert answer.startswith(said)
    assert answer.count("\n") == 1


def test_without_a_word_it_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/morphtrain"])
    assert program.main() == 2
    listed = re.findall(r"^  (\w+) +\S", capsys.readouterr().err.partition("commands:\n")[2], re.MULTILINE)
    assert listed == list(program.COMMANDS)


@pytest.mark.parametrize(
    ("words", "of_run"),
    [
        (["prunetrain", "model.width=32"], ["+sweep=prunetrain", "model.width=32"]),
        (["mine", "--config-dir", "own"], ["+sweep=mine", "--config-dir", "own"]),
        (["prunetrain", "--help"], ["+sweep=prunetrain", "--help"]),
        (["seed=1,2", "epochs=3"], ["--multirun", "seed=1,2", "epochs=3"]),
        (["+launcher=joblib", "seed=1,2"], ["--multirun", "+launcher=joblib", "seed=1,2"]),
        (["~prune", "seed=1,2"], ["--multirun", "~prune", "seed=1,2"]),
        (["--config-dir", "own"], ["--multirun", "--config-dir", "own"]),
    ],
)
def test_a_sweep_is_a_run_of_several(words: list[str], of_run: list[str]) -> None:
    assert program.of_sweep("morphtrain", words) == of_run


def test_a_grid_by_its_command(form: Form, tmp_path: Path) -> None:
    result = form("sweep", *QUICK, "seed=1,2", "tracking=none", "hydra.sweep.dir=grid")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [len(read_records(tmp_path / "grid" / job)) for job in ("0", "1")] == [1, 1]


def test_help_of_a_sweep_lists_the_presets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["morphtrain", "sweep", "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: morphtrain sweep [PRESET]")
    assert all(path.stem in said for path in (schema.CONF / "sweep").glob("*.yaml"))


@pytest.mark.parametrize(
    ("first", "typed"),
    [
        ("morphtrain run", "morphtrain report"),
        ("python -m morphtrain run", "python -m morphtrain report"),
        ("/usr/lib/python3/morphtrain/run.py", "python -m morphtrain.report"),
        ("/my morphtrain run", "python -m morphtrain.report"),
        ("python -m morphtrain.run", "python -m morphtrain.report"),
        ("-c", "python -m morphtrain.report"),
    ],
)
def test_commands_are_named_in_the_form_that_was_typed(first: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [first, "prune=none"])
    assert command_name("report") == typed


def test_versions_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["morphtrain", "--version"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert (ended.value.code, capsys.readouterr().out) == (0, f"morphtrain {morphtrain.__version__}\n")
    monkeypatch.setattr(sys, "argv", ["morphtrain", "run", "--version"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it to 1
    program.main(program.AS_A_MODULE)
    assert capsys.readouterr().out.startswith(f"MorphTrain {morphtrain.__version__}, Hydra ")


@pytest.mark.parametrize(("words", "heavy"), [(["--help"], "hydra"), (["run", "--cfg", "job"], "torch")])
def test_it_starts_without_what_is_slow(words: list[str], heavy: str, script: Path) -> None:
    line = [sys.executable, "-X", "importtime", str(script), *words]
    imported = subprocess.run(line, capture_output=True, text=True, check=True, cwd=script.parent).stderr
    assert re.search(r"\| +morphtrain\.flags$", imported, re.MULTILINE)
    assert not re.search(rf"\| +({heavy}|torch|mlflow|optuna|pandas)$", imported, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("several", [["processes=2"], ["seed=1,2", "+launcher=joblib"]])
def test_what_starts_processes_works_under_the_script(several: list[str], script: Path, tmp_path: Path) -> None:
    """Their network is of a module in the current directory."""
    (tmp_path / "my_nets.py").write_text(MY_NET)
    words = (*QUICK[:4], *QUICK[6:], "model=custom", "model._target_=my_nets.Net", "tracking=none", *several)
    result = subprocess.run([script, "run", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(tmp_path.rglob("records.jsonl"))) == (2 if "seed=1,2" in several else 1)


@pytest.mark.slow
def test_torchrun_starts_the_script(script: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*torchrun, str(script), "run", *QUICK, "tracking=none", "hydra.run.dir=run"]
    result = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [record["processes"] for record in read_records(tmp_path / "run")] == [2]


@pytest.mark.slow
def test_a_signal_ends_the_script_in_order(script: Path, tmp_path: Path) -> None:
    words = [script, "run", *SMALL[:7], "epochs=500", "tracking=none", "hydra.run.dir=run"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("epoch    1/"))
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert (tmp_path / "run" / "last.pt").exists()
