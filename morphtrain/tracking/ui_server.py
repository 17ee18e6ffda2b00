"""MLflow's own server, for one person on this machine: a child of the command, with which it ends, however that ends.

`python -m morphtrain.tracking.ui_server` is that child; its arguments are those of `mlflow server`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from morphtrain import interrupts
from morphtrain.errors import UserError
from morphtrain.tracking.store import database_file

HOST = "127.0.0.1"
TRIED = 100  # ports from the wanted one on
# It sends no telemetry, and has no processes for jobs beside the server's; the user's own settings win.
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def free_port(wanted: int) -> int:
    """The first port from `wanted` on that is free here; raises `UserError` if none is, or none may be taken."""
    for port in range(wanted, min(wanted + TRIED, 2**16)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise UserError(f"--port {port}: {error.strerror}; 5000 and above works") from error
            else:
                return port
    raise UserError(f"--port {wanted}: it and the {TRIED} after it are taken")


def serve(uri: str, port: int, page: str = "/") -> None:
    """Serve the UI on the store at `uri`, print its address once it answers, and wait until a signal ends it.

    Args:
        uri: of a database, or of files.
        port: one that is free.
        page: what of the server the printed address opens, as `/#/experiments/1`.

    Raises:
        Interrupted: after a signal.
        UserError: if the server ends by itself; it has said why.
    """
    with _server(uri, port) as process:
        while process.poll() is None and not _answers(port):
            interrupts.wait(0.1)
        if process.poll() is None:
            print(f"http://{HOST}:{port}{page}   (Ctrl-C ends it)", flush=True)
        while process.poll() is None:
            interrupts.wait(0.5)
    raise UserError(f"MLflow's server has ended, with code {process.returncode}")


@contextlib.contextmanager
def _server(uri: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    options = ["--host", HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts=--log-level warning"]
    environment = {
        **ENVIRONMENT,
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,  # with a password perhaps, and everybody here may read the arguments
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
    }
    path = database_file(uri)
    process = subprocess.Popen(
        [sys.executable, "-m", "morphtrain.tracking.ui_server", *options],
        env=environment,
        cwd=Path.cwd() if path is None else path.parent,  # where files that MLflow makes belong
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is meant for the command, which ends the server
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def _end_with_parent() -> None:
    """End this process and its own children when its standard input ends: the command has ended."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Be `mlflow server`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from mlflow.cli import cli

    cli(["server", *sys.argv[1:]])


if __name__ == "__main__":
    main()
