"""What MLflow costs: its start on an existing database, and its share of epochs of one second; a dead server, too."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

START_LIMIT = 4.0  # seconds
SHARE_LIMIT = 0.01  # of an epoch of one second

START = """
import time; start = time.perf_counter()
from pathlib import Path
from morphtrain.tracking.mlflow import MLflowTracker
tags = {"model": "resnet8", "prune": "none", "precision": "o0", "seed": "1"}
tracker = MLflowTracker("sqlite:///mlflow.db", "benchmark")
tracker.start({f"key.{i}": i for i in range(50)}, tags, Path("run"), resumed=False)
assert tracker.client is not None
print(time.perf_counter() - start)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        first, *later = [
            float(
                subprocess.run(
                    [sys.executable, "-c", START], cwd=directory, capture_output=True, text=True, check=True
                ).stdout
            )
            for _ in range(6)
        ]
        seconds = statistics.median(later)
        verdict = "ok" if seconds <= START_LIMIT else "EXCEEDED"
        print(
            f"tracking: start on an existing database = {seconds:.2f} s (on a new one {first:.2f} s)   "
            f"limit {START_LIMIT:.0f} s {verdict}"
        )
        share = statistics.median(flush_share(Path(directory)) for _ in range(7))
        print(
            f"tracking: MLflow / epochs of one second = {share:.5f}   "
            f"limit {SHARE_LIMIT:.2f} {'ok' if share <= SHARE_LIMIT else 'EXCEEDED'}"
        )
        start, share, end = dead_server(Path(directory))
        print(
            f"tracking: a server that never answers / epochs of one second = {share:.5f}   "
            f"limit {SHARE_LIMIT:.2f} {'ok' if share <= SHARE_LIMIT else 'EXCEEDED'} "
            f"(and {start:.1f} s before the first, {end:.1f} s after the last)"
        )


def dead_server(directory: Path) -> tuple[float, float, float]:
    """Seconds at the start, of an epoch of one second (the mean of 20, each sent at once), and at the end."""
    from morphtrain.tracking.mlflow import MLflowTracker

    tags = {"model": "resnet8", "prune": "none", "precision": "o0", "seed": "1"}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts and says nothing
        tracker = MLflowTracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "benchmark", flush_seconds=0)
        start = timed(lambda: tracker.start({}, tags, directory, resumed=False))
        history = []
        spent = 0.0
        for epoch in range(1, 21):
            time.sleep(1)
            history.append({"epoch": epoch, "timestamp": time.time(), **{f"metric_{i}": 1.0 * i for i in range(18)}})
            spent += timed(lambda: tracker.update(history))
        return start, spent / 20, timed(lambda: tracker.finish("FINISHED", history))


def timed(action: Callable[[], None]) -> float:
    before = time.perf_counter()
    action()
    return time.perf_counter() - before


def flush_share(directory: Path) -> float:
    """Seconds spent in the tracker over ten epochs of one second: nine calls that wait, one that sends."""
    from morphtrain.tracking.mlflow import MLflowTracker

    tags = {"model": "resnet8", "prune": "none", "precision": "o0", "seed": "1"}
    tracker = MLflowTracker(f"sqlite:///{directory}/mlflow.db", "benchmark", flush_seconds=10)
    tracker.start({}, tags, directory / "run", resumed=False)
    history = []
    spent = 0.0
    for epoch in range(1, 11):
        history.append({"epoch": epoch, "timestamp": time.time(), **{f"metric_{i}": 1.0 * i for i in range(18)}})
        if epoch == 10:
            tracker.last_flush -= tracker.flush_seconds  # ten seconds have passed
        spent += timed(lambda: tracker.update(history))
    assert tracker.sent_epoch == 10
    return spent / 10


if __name__ == "__main__":
    main()
