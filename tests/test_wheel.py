"""Wheel and sdist: complete, valid, and every command works where there is no checkout."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import SMALL
from test_experiments import DECLARED

import morphtrain

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
RUN = ("data=digits", "model.width=8", "model.blocks=1", "epochs=1", "timing.reference=0", "hydra.run.dir=run")


def build(target: str, source: Path, directory: Path) -> Path:
    """What hatchling builds of a source tree, without a network: a wheel or an sdist."""
    line = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    subprocess.run(line, cwd=source, check=True, capture_output=True)
    (built,) = directory.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


def install(wheel: Path, prefix: Path) -> Path:
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(prefix), str(wheel)], check=True)
    return prefix


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the wheel was installed into, without its dependencies."""
    return install(wheel, tmp_path_factory.mktemp("installed"))


def run(prefix: Path, cwd: Path, *words: str, check: bool = True) -> str:
    """What an installed `morphtrain` prints."""
    env = {**os.environ, "PYTHONPATH": str(prefix)}
    line = [str(prefix / "bin" / "morphtrain"), *words]
    result = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result.stdout


def in_tree() -> set[str]:
    """The files that an installed package has to have."""
    package = {path.relative_to(ROOT) for path in (ROOT / "morphtrain").rglob("*") if path.is_file()}
    conf = {Path("morphtrain") / path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*") if path.is_file()}
    return {str(path) for path in package | conf if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == in_tree()
    needed = {"py.typed", "conf/config.yaml", "report/page.html", "report/chapter3.yaml", "completion/script.bash"}
    assert {f"morphtrain/{name}" for name in needed} <= names


def test_the_sdist_gives_the_same_wheel(wheel: Path, wheel_of_sdist: Path) -> None:
    def contents(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    assert contents(wheel_of_sdist) == contents(wheel)


def test_the_sdist_holds_what_it_is_built_from_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "conf/config.yaml"} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {"morphtrain", "conf"}


def test_the_metadata_is_complete_and_valid(wheel: Path, sdist: Path) -> None:
    checked = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    result = subprocess.run(checked, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("PASSED") == 2
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == morphtrain.__version__
    assert metadata["Author"] == "MorphTrain developers"
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata["Keywords"] and metadata["Requires-Python"] and metadata["Summary"]
    assert not re.search(r"https?://", str(metadata.get_all("Project-URL"))), "there is no home page to name"


def test_an_installed_command_works_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "--version") == f"morphtrain {morphtrain.__version__}\n"
    assert "lasso_ratio:" in run(installed, tmp_path, "run", "prune=prunetrain", "--help")
    assert "epochs: 3\n" in run(installed, tmp_path, "run", "epochs=3", "--cfg", "job")
    assert list(tmp_path.iterdir()) == []
    assert "val_acc" in run(installed, tmp_path, "run", *RUN, "tracking=none")
    assert (tmp_path / "run" / "last.pt").exists()


def test_the_modules_are_those_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    look = "import morphtrain; from morphtrain import schema; print(morphtrain.__file__, schema.CONF)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    shown = subprocess.run([sys.executable, "-c", look], env=env, cwd=tmp_path, capture_output=True, text=True)
    package = installed / "morphtrain"
    assert shown.stdout.split() == [str(package / "__init__.py"), str(package / "conf")], shown.stderr


@pytest.mark.slow
def test_the_documented_commands_work_with_an_installed_sdist(wheel_of_sdist: Path, tmp_path: Path) -> None:
    installed, home = install(wheel_of_sdist, tmp_path / "installed"), tmp_path / "home"
    home.mkdir()
    narrow = ("data=digits", "model.width=4")
    small = (*narrow, "epochs=1", "timing.reference=0", "tracking=none")
    run(installed, home, "run", *SMALL, "precision=o1", "epochs=2", "timing.reference=0", "hydra.run.dir=run")
    assert (home / "mlflow.db").exists()
    assert "trials" in run(installed, home, "sweep", "prunetrain", *small, "hydra.sweeper.n_trials=2")
    assert "time" in run(installed, home, "compare", *narrow, "--", "norm=batch", "--", "norm=weight", "--steps", "4")
    assert "rate" in run(installed, home, "lr_finder", "model.width=4", "--steps", "20", "--output", "rates")
    assert "largest batch" in run(installed, home, "maxbatch", "budget=1GiB", "throughput_seconds=0")
    assert "onnx" in run(installed, home, "export", "run/best.pt")
    assert "val_accuracy" in run(installed, home, "evidence", "table", "run")
    assert "nothing to send" in run(installed, home, "tracking", "run")
    (home / "own" / "experiment").mkdir(parents=True)
    (home / "own" / "experiment" / "quick.yaml").write_text(DECLARED.strip())
    experiment = ("--config-dir", "own", "+experiment=quick", "tracking=none")
    assert "next: morphtrain report experiments/quick-small" in run(installed, home, "run", *experiment)
    assert run(installed, home, "report", "experiments/quick-small").startswith("report.html\n")
