"""Ray, started for the sweep on this machine, runs what the basic launcher runs, and restarts what dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, Command
from test_launchers import check_a_sweep_two_by_two
from test_resume import assert_same, contents

from morphtrain.evidence.records import read_records

pytestmark = pytest.mark.slow
pytest.importorskip("hydra_plugins.hydra_ray_launcher.ray_launcher")

JOBS = ("-m", *SMALL, "epochs=60", "seed=1,2", "timing.cores=1", "tracking=none", "hydra.sweep.dir=jobs")
RAY = ("+launcher=ray", "hydra.launcher.ray.init.num_cpus=2")


def worker(directory: Path) -> int | None:
    """The process id of a job that Ray runs in `directory`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            runs_job = process.joinpath("cmdline").read_bytes().startswith(b"ray::_run_job")
            if runs_job and os.readlink(process / "cwd") == str(directory):
                return int(process.name)
        except OSError:  # it has ended meanwhile
            continue
    return None


def test_a_job_that_dies_is_restarted_and_goes_on(command: Command, tmp_path: Path) -> None:
    alone, tasks = tmp_path / "alone", tmp_path / "tasks"
    for directory in (alone, tasks):
        directory.mkdir()
    assert command(*JOBS, cwd=alone).returncode == 0
    with subprocess.Popen(
        [sys.executable, "-m", "morphtrain.run", *JOBS, *RAY],
        cwd=tasks,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as multirun:
        wait_for_both(tasks, multirun)
        victim = worker(tasks)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        said, _ = multirun.communicate(timeout=300)
    assert multirun.returncode == 0, said
    resumed = 0
    for job in ("0", "1"):
        assert_same(contents(tasks / "jobs" / job / "last.pt"), contents(alone / "jobs" / job / "last.pt"))
        resumed += "going on after epoch" in (tasks / "jobs" / job / "run.log").read_text()
    assert resumed == 1


def wait_for_both(directory: Path, multirun: subprocess.Popen) -> None:
    for _ in range(600):
        if all((directory / "jobs" / job / "previous.pt").exists() for job in ("0", "1")):
            return
        assert multirun.poll() is None, multirun.communicate()
        time.sleep(0.2)
    raise AssertionError("no checkpoints within two minutes")


def test_a_sweep_is_trained_by_tasks(command: Command, tmp_path: Path) -> None:
    check_a_sweep_two_by_two(command, tmp_path, *RAY)


def test_a_mistake_in_a_job_is_a_line(command: Command) -> None:
    result = command("-m", *SMALL, *RAY, "model.width=0,-1", "tracking=none")
    assert result.returncode == 1
    said = result.stderr.splitlines()  # Ray's own last words come after it
    assert "model.width=0: must be 1 or more channels" in said
    assert "Traceback" not in result.stdout + result.stderr


def test_a_task_starts_the_processes_of_its_run(command: Command, tmp_path: Path) -> None:
    """They train what two processes train that the basic launcher starts, and Ray counts both cores."""
    jobs = ("-m", *SMALL, "seed=1,2", "processes=2", "timing.cores=1", "tracking=none")
    for directory, launcher in (("alone", ()), ("tasks", RAY)):
        result = command(*jobs, *launcher, f"hydra.sweep.dir={directory}", env={"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stdout + result.stderr
    for job in ("0", "1"):
        assert_same(contents(tmp_path / "tasks" / job / "last.pt"), contents(tmp_path / "alone" / job / "last.pt"))
    times = [[record["timestamp"] for record in read_records(tmp_path / "tasks" / job)] for job in ("0", "1")]
    assert max(times[0]) < min(times[1]) or max(times[1]) < min(times[0]), "one after the other: each has both cores"
