"""Completion: what the last word of a command line may become, asked directly and by real shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Answer

from morphtrain import __main__ as program
from morphtrain import run as run_command
from morphtrain.completion import SHELLS, script
from morphtrain.completion.query import candidates

BREAKS = " \t\n\"'@><=;|&(:"  # bash's own
IN_BASH = """
source {script}
COMP_WORDBREAKS={breaks} COMP_LINE={line} COMP_POINT={point}
_morphtrain
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
# Replaces the parts of zsh's completion that only a terminal has.
IN_ZSH = """
compdef() {{ : }}; compadd() {{ print -l -- "${{@[$@[(i)--]+1,-1]}}" }}; _files() {{ print files }}
source {script}
words=({line}); CURRENT=$#words; PREFIX=$words[-1]
_morphtrain
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the command, as pip installs it, and its completion, for every shell and form."""
    directory = tmp_path_factory.mktemp("bin")
    command = directory / "morphtrain"
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom morphtrain.__main__ import main\nsys.exit(main())\n")
    command.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for name, first in (("script", "morphtrain completion"), ("module", "python -m morphtrain.completion")):
            patch.setattr(sys, "argv", [first])
            for shell in SHELLS:
                (directory / f"{name}.{shell}").write_text(script(shell))
    return directory


def by(shell: str, text: str, installed: Path, cwd: Path) -> list[str]:
    env = {**os.environ, "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([shell, "-c", text], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return [line for line in result.stdout.splitlines() if line]


def in_bash(line: str, installed: Path, cwd: Path, breaks: str = BREAKS, form: str = "script") -> list[str]:
    """The replies of bash's function, each after what bash leaves of the word as it stands."""
    values = {"script": installed / f"{form}.bash", "breaks": breaks, "line": line, "point": str(len(line))}
    return by("bash", IN_BASH.format(**{k: shlex.quote(str(v)) for k, v in values.items()}), installed, cwd)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("morphtrain re", ["report"]),
        ("morphtrain --v", ["--version"]),
        ("morphtrain run prun", ["prune.", "prune="]),
        ("morphtrain run prune=pr", ["prune=prunetrain"]),
        ("morphtrain run prune=none,pr", ["prune=none,prunetrain"]),
        ("morphtrain run prune=prunetrain prune.la", ["prune.lasso_ratio=", "prune.lasso_ratio_of="]),
        ("morphtrain run prune.la", []),
        ("morphtrain run optimizer=adamw optimizer.bet", ["optimizer.betas="]),
        ("morphtrain run optimizer=adamw optimizer.betas=", []),
        ("morphtrain run obj", ["objective="]),
        ("morphtrain run tracking.al", ["tracking.also="]),
        ("morphtrain run hydra.run=", []),
        ("morphtrain run hydra.run.d", ["hydra.run.dir="]),
        ("morphtrain run seed=", ["seed=1"]),
        ("morphtrain run clip_norm=", []),
        ("morphtrain run +sweep=pa", ["+sweep=pareto"]),
        ("morphtrain run +swe", ["+sweep="]),
        ("morphtrain run +experiment=recipe siz", ["size="]),
        ("morphtrain run siz", []),
        ("morphtrain run --mul", ["--multirun"]),
        ("morphtrain run --cfg ", ["all", "hydra", "job"]),
        ("morphtrain run --cfg job prune=e", ["prune=early"]),
        ("morphtrain run --config-dir ", []),
        ("morphtrain run -m seed=1,2 loss=cr", ["loss=cross_entropy"]),
        ("morphtrain sweep gro", ["grow.", "grow=", "growth"]),
        ("morphtrain sweep prunetrain prune.thr", ["prune.threshold="]),
        ("morphtrain compare prune=none -- prune=prunetrain prune.thr", ["prune.threshold="]),
        ("morphtrain compare prune=none -- prune=prunetrain --st", ["--steps"]),
        ("morphtrain compare --steps ", []),
        ("morphtrain lr_finder optimizer=la", ["optimizer=lars"]),
        ("morphtrain maxbatch budg", ["budget="]),
        ("morphtrain maxbatch prune=", []),
        ("morphtrain report --o", ["--out"]),
        ("morphtrain report exp", []),
        ("morphtrain evidence t", ["table", "test"]),
        ("morphtrain evidence test runs --pa", ["--paired"]),
        ("morphtrain completion z", ["zsh"]),
        ("morphtrain nothing --h", []),
        ("/opt/venv/bin/morphtrain ex", ["export"]),
        ("python -m morphtrain.r", ["morphtrain.report", "morphtrain.run"]),
        ("python -m morphtrain.sw", []),
        ("python3.11 -m morphtrain.run prune=ea", ["prune=early"]),
        ("python -m morphtrain run prune=ea", ["prune=early"]),
        ("python -m morphtrain ru", ["run"]),
        ("python train.py prune=ea", []),
        ("python -m pytest prune=ea", []),
    ],
)
def test_what_a_word_may_become(line: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["morphtrain completion"])  # it is changed
    assert candidates(line.split(" ")) == expected


def test_all_that_an_empty_word_may_become(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["morphtrain completion"])
    assert set(candidates(["morphtrain", ""])) == {*program.COMMANDS, "--help", "--version"}
    found = candidates(["morphtrain", "run", ""])
    assert {"model=", "prune=", "+sweep=", "+experiment=", "+launcher=", "epochs=", "optimizer."} <= set(found)
    assert not {"sweep=", "experiment=", "launcher=", "size="} & set(found)


def test_options_of_the_users_own_are_found(tmp_path: Path) -> None:
    (tmp_path / "own" / "prune").mkdir(parents=True)
    (tmp_path / "own" / "prune" / "mine.yaml").write_text("_target_: my_package.Mine\nstrength: 1\n")
    there = ["morphtrain", "run", "--config-dir", str(tmp_path / "own")]
    assert candidates([*there, "prune=mi"]) == ["prune=mine"]
    assert candidates([*there, "prune=mine", "prune.str"]) == ["prune.strength="]
    assert candidates(["morphtrain", "run", f"--config-dir={tmp_path / 'own'}", "prune=mi"]) == ["prune=mine"]
    assert candidates(["morphtrain", "run", "prune=mi"]) == []


@pytest.mark.parametrize("breaks", [BREAKS, BREAKS.replace("=", "")], ids=["=", "no ="])
def test_bash_completes_options_and_keys(breaks: str, installed: Path, tmp_path: Path) -> None:
    """Where = ends a word, bash replaces what follows it only."""
    start = "" if "=" in breaks else "prune="
    assert in_bash("morphtrain run prune=pr", installed, tmp_path, breaks) == [f"{start}prunetrain"]
    line = "morphtrain run prune=prunetrain prune.thre"
    assert in_bash(line, installed, tmp_path, breaks) == ["prune.threshold="]


def test_bash_completes_modules(installed: Path, tmp_path: Path) -> None:
    python = f"{sys.executable} -m morphtrain.run"
    assert in_bash(f"{python} loss=cr", installed, tmp_path, form="module") == ["cross_entropy"]
    assert in_bash(f"{sys.executable} -m pytest te", installed, tmp_path, form="module") == []


def test_bash_quotes_what_it_inserts_and_runs_none_of_it(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "prune").mkdir(parents=True)
    for name in ("a $(touch ran)", "a`touch ran`", "a;touch ran"):
        (tmp_path / "own" / "prune" / f"{name}.yaml").write_text("_target_: my_package.Mine\n")
    replies = in_bash("morphtrain run --config-dir own prune=a", installed, tmp_path)
    assert sorted(word for reply in replies for word in shlex.split(reply)) == sorted(
        ["a $(touch ran)", "a`touch ran`", "a;touch ran"]
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="has no PYTHONSAFEPATH")
@pytest.mark.parametrize("form", ["script", "module"])
def test_nothing_of_the_current_directory_is_imported(form: str, installed: Path, tmp_path: Path) -> None:
    for name in ("hydra", "omegaconf", "morphtrain", "argparse", "flags"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    command = {"script": "morphtrain run", "module": f"{sys.executable} -m morphtrain.run"}[form]
    assert in_bash(f"{command} prune=pr", installed, tmp_path, form=form) == ["prunetrain"]
    report = {"script": "morphtrain report", "module": f"{sys.executable} -m morphtrain.report"}[form]
    assert in_bash(f"{report} --o", installed, tmp_path, form=form) == ["--out"]
    assert not (tmp_path / "ran").exists()


def test_a_user_presses_tab(installed: Path, tmp_path: Path) -> None:
    """In an interactive bash on a terminal: a space follows an option, and none a key."""
    leader, follower = pty.openpty()
    env = {**os.environ, "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb", "PS1": "> "}
    shell = ["bash", "--norc", "--noprofile", "-i"]
    ends = {"stdin": follower, "stdout": follower, "stderr": follower}
    with subprocess.Popen(shell, cwd=tmp_path, env=env, start_new_session=True, **ends) as bash:
        try:
            os.write(leader, f"source {installed}/script.bash\n".encode())
            os.write(leader, b"morphtrain run prune=prunet\tprune.thre\t")
            assert "morphtrain run prune=prunetrain prune.threshold=" in shown(leader, "threshold=")
        finally:
            bash.kill()
            os.close(leader)
            os.close(follower)


def shown(terminal: int, until: str) -> str:
    """What a terminal shows until `until`, for at most half a minute."""
    text, end = "", time.monotonic() + 30
    while until not in text and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            text += re.sub(r"\x1b\[\??[\d;]*[a-z]|\x07", "", os.read(terminal, 4096).decode())
    return text


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes(installed: Path, tmp_path: Path) -> None:
    for line, expected in (
        ("morphtrain run prune=pr", ["prune=prunetrain"]),
        ("morphtrain run prune=prunetrain prune.thre", ["prune.threshold="]),
        (f"{sys.executable} -m morphtrain.run loss=cr", ["loss=cross_entropy"]),
        ("morphtrain report exp", ["files"]),
    ):
        text = IN_ZSH.format(script=installed / "module.zsh", line=line)
        assert by("zsh", text, installed, tmp_path) == expected, line


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes(installed: Path, tmp_path: Path) -> None:
    for line, expected in (
        ("morphtrain run prune=pr", ["prune=prunetrain"]),
        ("morphtrain run prune=prunetrain prune.thre", ["prune.threshold="]),
        (f"{sys.executable} -m morphtrain.run loss=cr", ["loss=cross_entropy"]),
    ):
        text = f"source {installed}/module.fish; complete --do-complete {shlex.quote(line)}"
        assert by("fish", text, installed, tmp_path) == expected, line


def test_a_query_waits_for_no_torch() -> None:
    words = ["query", "--", "morphtrain", "run", "prune=prunetrain", "prune.la"]
    line = [sys.executable, "-X", "importtime", "-m", "morphtrain.completion", *words]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["prune.lasso_ratio=", "prune.lasso_ratio_of="]
    assert not re.search(r"\| +(torch|mlflow|optuna)$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("shell", SHELLS)
def test_hydras_flag_prints_the_same_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it to 1
    said = {}
    for action in ("install", "uninstall"):
        monkeypatch.setattr(sys, "argv", ["morphtrain run", "-sc", f"{action}={shell}"])
        run_command.main()
        said[action] = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["morphtrain completion", shell])
    program_of_its_own = script(shell)
    assert said["install"].strip() == program_of_its_own.strip()
    assert "morphtrain" in said["uninstall"]
    assert "python" not in said["uninstall"].replace("morphtrain", "")


def test_other_uses_of_hydras_flag_are_refused(answer: Answer) -> None:
    wanted = "--shell-completion: must have install=SHELL or uninstall=SHELL, of bash, zsh, fish"
    assert answer("-sc") == answer("-sc", "install=tcsh") == answer("--shell-completion", "query=bash") == wanted
