"""MLflow's UI opens on what a run recorded."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL, Command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def ui(command: Command, tmp_path: Path) -> Iterator[str]:
    """The address of a UI over one recorded run."""
    assert command(*SMALL, "epochs=2").returncode == 0
    port = free_port()
    store = ["--backend-store-uri", "sqlite:///mlflow.db", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-m", "mlflow", "ui", *store, "--workers", "1"], cwd=tmp_path)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def get(address: str, body: dict | None = None) -> bytes:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener().open(request, timeout=10) as answer:  # urlopen leaves its own to all tests
        return answer.read()


@pytest.mark.slow
def test_the_ui_opens_on_the_runs(ui: str) -> None:
    for _ in range(60):
        try:
            page = get(ui)
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    else:
        pytest.fail("the UI did not start within a minute")
    assert b"MLflow" in page
    experiments = json.loads(get(f"{ui}/api/2.0/mlflow/experiments/search", {"max_results": 10}))["experiments"]
    (ours,) = [e for e in experiments if e["name"] == "morphtrain"]
    runs = json.loads(get(f"{ui}/api/2.0/mlflow/runs/search", {"experiment_ids": [ours["experiment_id"]]}))["runs"]
    (run,) = runs
    assert {"val_accuracy", "train_seconds"} <= {metric["key"] for metric in run["data"]["metrics"]}
