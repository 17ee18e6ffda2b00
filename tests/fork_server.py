"""Python commands as children of a process that has imported torch and MLflow, which spares each some four seconds.

A child is a process of its own, with its own directory, environment, output, signals and exit code. What it does not
show is how Python starts: variables of the interpreter, what is imported when, another hash seed.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# What a run imports; not `morphtrain.run`, which `-m` runs as a module of its own.
IMPORTS = (
    "hydra.main",
    "hydra._internal.hydra",
    "matplotlib.pyplot",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "morphtrain.sweep.plugin",
    "morphtrain.sweep.trial",
    "morphtrain.trainer.train",
    "optuna",
    "scipy.stats",
    "sklearn.datasets",
    "torch._dynamo",
    "torchvision",
)


class ForkServer:
    """Runs `python *arguments`, one command at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` would answer, with these variables on top of the test's, and the output captured."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            output = [str(Path(directory, name)) for name in ("stdout", "stderr")]
            order = {"arguments": arguments, "cwd": str(cwd), "output": output, "timeout": timeout}
            order["env"] = {**os.environ, **(env or {})}
            print(json.dumps(order), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            if code == -signal.SIGALRM:
                raise subprocess.TimeoutExpired(arguments, timeout)
            return subprocess.CompletedProcess(arguments, code, *(Path(file).read_text() for file in output))

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """Fork a child for each order that comes on stdin, and answer with its exit code."""
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    packages = [place for place in sys.path[1:] if place not in own]
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # or every child would copy what its first collection touches
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            leave(obey(json.loads(line), packages))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def obey(order: dict[str, Any], packages: list[str]) -> int:
    """In the child: be `python *arguments`, and return the exit code."""
    signal.setitimer(signal.ITIMER_REAL, order["timeout"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which in the background is ignored
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(order["output"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    tempfile.tempdir = None  # it remembers TMPDIR
    first, *rest = order["arguments"]
    as_module = first == "-m"
    sys.argv = rest if as_module else [first, *rest]
    place = order["cwd"] if as_module else os.path.dirname(first)
    own = [path for path in order["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [place, *own, *packages]
    try:
        if as_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - any of them ends Python with a traceback
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End the child as Python ends, without the three seconds in which it would unload what the server has loaded."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
