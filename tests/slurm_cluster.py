"""A Slurm of one node, Debian's, started in a directory of its own: munged, slurmctld and slurmd."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from postgres_server import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
MUNGE = "munge"  # the user that munged runs as

# No accounting, no cgroups, and jobs may start on what is left of a core.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)}: not installed (Debian: apt-get install slurm-wlm munge)"
    if os.getuid() != 0:
        return "Slurm's daemons are started as root"
    if not any(entry.pw_name == MUNGE for entry in pwd.getpwall()):
        return f"there is no user {MUNGE}"
    return None


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find the cluster."""
    directory = Path(tempfile.mkdtemp(prefix="morphtrain-slurm-"))
    directory.chmod(0o755)
    environment = {"SLURM_CONF": str(write_config(directory))}
    munge = write_key(directory)
    with_us = ["setpriv", "--pdeathsig=TERM"]  # killed tests leave no daemon behind
    as_munge = [*with_us, f"--reuid={MUNGE}", f"--regid={MUNGE}", "--clear-groups"]
    files = [f"--{name.split('.')[0]}-file={munge / name}" for name in ("key", "pid", "seed", "log")]
    commands = [
        [*as_munge, "munged", "--foreground", f"--socket={munge / 'socket'}", *files],
        [*with_us, "slurmctld", "-D", "-L", str(directory / "slurmctld.log")],
        [*with_us, "slurmd", "-D", "-L", str(directory / "slurmd.log")],
    ]
    daemons: list[subprocess.Popen] = []
    try:
        with (directory / "daemons.log").open("w") as log:
            for command in commands:
                env = {**os.environ, **environment}
                daemons.append(subprocess.Popen(command, env=env, cwd=directory, stdout=log, stderr=log))
                time.sleep(0.5)
        wait_until_idle(environment, directory)
        yield environment
        # A job's keeper (slurmstepd) that cannot report its end to the controller never ends.
        subprocess.run(["scancel", "--user=root"], env={**os.environ, **environment}, check=True)
        wait_until_idle(environment, directory)
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
        shutil.rmtree(directory, ignore_errors=True)


def write_config(directory: Path) -> Path:
    for name in ("state", "spool"):
        (directory / name).mkdir()
    path = directory / "slurm.conf"
    path.write_text(
        SLURM_CONF.format(
            directory=directory,
            host=socket.gethostname().split(".")[0],
            controller_port=free_port(),
            node_port=free_port(),
            cores=os.cpu_count(),
        )
    )
    return path


def write_key(directory: Path) -> Path:
    munge = directory / "munge"
    munge.mkdir()
    key = munge / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for path in (munge, key):
        shutil.chown(path, MUNGE, MUNGE)
    munge.chmod(0o755)
    return munge


def wait_until_idle(environment: dict[str, str], directory: Path) -> None:
    for _ in range(60):
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env={**os.environ, **environment}, capture_output=True, text=True
        )
        if asked.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(path.read_text() for path in directory.glob("**/*.log"))
    raise RuntimeError(f"Slurm's node is not idle within 30 s: {asked.stdout}{asked.stderr}\n{logs}")
