"""Does calibrated time see through busy neighbours? The same run alone and beside three others, in turns.

    python contention.py [rounds]     # 4; some ten minutes

Once as runs share a machine that is left to them, all with all cores, and once with a core each (timing.cores=1; with
fewer than four cores two runs share one). The neighbours are runs like it that train until the measured one has ended.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

LIMIT = 0.10  # by which calibrated times may differ
NEIGHBOURS = 3
RUN = ("model.width=32", "tracking=none")
SETTINGS = {"all cores": (), "a core each": ("timing.cores=1",)}


@dataclass(frozen=True)
class Measured:
    """Of a whole run; `contended` is the share of its epochs."""

    raw: float
    calibrated: float
    contended: float


def command(directory: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "morphtrain.run", *RUN, f"hydra.run.dir={directory}", *overrides]


def measure(directory: Path, *overrides: str) -> Measured:
    """Train in a process of its own, and read what it recorded."""
    subprocess.run(command(directory, *overrides), check=True, stdout=subprocess.DEVNULL)
    facts = json.loads(torch.load(directory / "last.pt", weights_only=True)["facts"])
    history = facts["history"]
    marked = statistics.mean(record["contended"] for record in history)
    return Measured(history[-1]["train_seconds"], history[-1]["calibrated_train_seconds"], marked)


@contextmanager
def neighbours(place: Path, *overrides: str) -> Iterator[None]:
    """Three trainings that do not end, each behind its first epoch."""
    processes = [
        subprocess.Popen(
            command(place / f"neighbour_{number}", *overrides, "epochs=100000", f"seed={number}"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2, 2 + NEIGHBOURS)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            while not process.stdout.readline().startswith("epoch    1/"):
                assert process.poll() is None, "a neighbour has died"
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def compare(place: Path, rounds: int, *overrides: str) -> list[tuple[Measured, Measured]]:
    """Pairs of the run alone and beside the others; who is first takes turns."""

    def alone(directory: Path) -> Measured:
        return measure(directory / "alone", *overrides)

    def beside(directory: Path) -> Measured:
        with neighbours(directory, *overrides):
            return measure(directory / "beside", *overrides)

    pairs = []
    for number in range(rounds):
        directory = place / str(number)
        order = (alone, beside) if number % 2 == 0 else (beside, alone)
        found = {kind: kind(directory) for kind in order}
        pairs.append((found[alone], found[beside]))
    return pairs


def report(title: str, pairs: list[tuple[Measured, Measured]]) -> None:
    for quiet, busy in pairs:
        print(
            f"contention: {title}: raw {busy.raw:.1f} / {quiet.raw:.1f} s = {busy.raw / quiet.raw:.2f}, calibrated "
            f"{busy.calibrated:.2f} / {quiet.calibrated:.2f} = {busy.calibrated / quiet.calibrated:.3f}, contended "
            f"epochs {busy.contended:.0%} / {quiet.contended:.0%}"
        )
    raw = statistics.median(busy.raw / quiet.raw for quiet, busy in pairs)
    calibrated = statistics.median(busy.calibrated / quiet.calibrated for quiet, busy in pairs)
    print(
        f"contention: {title}: beside three / alone, medians of {len(pairs)}: raw {raw:.2f}, calibrated "
        f"{calibrated:.3f}   limit 1 +- {LIMIT:.2f} {'ok' if abs(calibrated - 1) <= LIMIT else 'EXCEEDED'}",
        flush=True,
    )


def main() -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    for title, overrides in SETTINGS.items():
        with tempfile.TemporaryDirectory() as place:
            report(title, compare(Path(place), rounds, *overrides, "epochs=15"))


if __name__ == "__main__":
    main()
