"""A real `mlflow server` on this machine that tests stop, kill and start again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

EXPERIMENT = "resilience"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server with its SQLite database and its artifacts in `directory`; it is not running at first."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        store = ["--backend-store-uri", f"sqlite:///{self.directory}/server.db"]
        files = ["--artifacts-destination", str(self.directory / "artifacts")]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *files, *place],
                cwd=self.directory,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                without_proxy.open(f"{self.uri}/health", timeout=5).close()
                return
            time.sleep(0.2)
        raise RuntimeError((self.directory / "server.log").read_text())

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Stop it: it still accepts connections, but answers nothing."""
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def query(self, sql: str, *values: object) -> list[tuple]:
        """Rows of the database, read without the server and without MLflow."""
        with contextlib.closing(sqlite3.connect(self.directory / "server.db", timeout=20)) as database:
            return database.execute(sql, values).fetchall()
