"""The wheel carries the config files: the command works where there is no checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, Command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the wheel was installed into, without its dependencies."""
    built, target = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(ROOT)], check=True)
    (wheel,) = built.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def test_the_command_runs_from_an_installed_wheel(installed: Path, fresh_command: Command, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed)}
    where = subprocess.run(
        [sys.executable, "-c", "from morphtrain import schema; print(schema.CONF)"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.strip() == str(installed / "morphtrain" / "conf")
    result = fresh_command(*SMALL, "precision=o1", "epochs=2", env=env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "mlflow.db").exists()
    assert fresh_command("--help", env=env).stdout.count("prunetrain")
