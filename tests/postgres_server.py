"""Debian's PostgreSQL, started on loopback in a directory of its own."""

from __future__ import annotations

import contextlib
import glob
import itertools
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

PASSWORD = "hush%2Fhush"  # as it stands in an address: hush/hush
USER = "postgres"  # initdb refuses to run as root


def program(name: str) -> str | None:
    """Debian keeps the server's programs out of the way."""
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else shutil.which(name)


def missing() -> str | None:
    """Why no server can be started here; None if one can."""
    if program("initdb") is None or program("postgres") is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.getuid() == 0 and not any(entry.pw_name == USER for entry in pwd.getpwall()):
        return f"PostgreSQL does not run as root, and there is no user {USER}"
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PostgresServer:
    """A running server; `database()` makes an empty one and gives its address."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.numbers = itertools.count()

    def address(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        name = f"study{next(self.numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.address(name)

    def execute(self, statement: str) -> list[tuple]:
        import psycopg

        with psycopg.connect(self.address("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def running() -> Iterator[PostgresServer]:
    directory = Path(tempfile.mkdtemp(prefix="morphtrain-postgres-"))
    as_user = ["setpriv", "--pdeathsig=INT"] if shutil.which("setpriv") else []  # killed tests leave no server behind
    if os.getuid() == 0:
        shutil.chown(directory, USER, USER)
        as_user += [f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    data, secret, port = directory / "data", directory / "secret", free_port()
    secret.write_text(PASSWORD.replace("%2F", "/"))
    secret.chmod(0o644)
    # Test data need not survive a power cut.
    settings = [
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-k",
        str(directory),
        "-c",
        "fsync=off",
        "-c",
        "full_page_writes=off",
    ]
    make = ["--auth=scram-sha-256", f"--username={USER}", f"--pwfile={secret}", "--no-sync", "--encoding=UTF8"]
    try:
        subprocess.run(
            [*as_user, program("initdb"), "-D", data, *make, "--locale=C"],
            cwd=directory,
            check=True,
            capture_output=True,
        )
        with (directory / "log").open("w") as log:
            server = subprocess.Popen(
                [*as_user, program("postgres"), "-D", data, *settings], cwd=directory, stdout=log, stderr=log
            )
        try:
            wait_until_ready(server, port, directory / "log")
            yield PostgresServer(port)
        finally:
            server.send_signal(signal.SIGINT)  # fast: what is connected is cut off
            server.wait(30)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def wait_until_ready(server: subprocess.Popen, port: int, log: Path) -> None:
    ready = [program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    for _ in range(300):
        if server.poll() is not None:
            raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}")
        if subprocess.run(ready).returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"PostgreSQL did not answer within 30 s:\n{log.read_text()}")
