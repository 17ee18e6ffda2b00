"""Does calibrated time see through busy neighbours? The same run alone and beside three others, in turns.

    python contention.py [rounds [settings]]     # 4, all; "2 1" is two rounds of the first setting

The neighbours are runs like it that train until the measured one has ended. Settings: a core each (with fewer than four
cores, two runs share one); all with all cores, whose threads sleep while they wait for one another; and the same with
threads that spin, OpenMP's default: then many threads spin while one waits for its core, and all runs are many times
slower than four runs have to be.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from morphtrain.evidence.records import read_records

LIMIT = 0.10  # by which calibrated times may differ
NEIGHBOURS = 3
RUN = ("model.width=32", "epochs=15", "tracking=none")
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {  # overrides, environment
    "a core each": (("timing.cores=1",), {}),
    "all cores, sleeping": ((), {"OMP_WAIT_POLICY": "passive"}),
    "all cores, spinning": ((), {}),
}


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
    history = read_records(directory)
    marked = statistics.mean(record["contended"] for record in history)
    return Measured(history[-1]["train_seconds"], history[-1]["calibrated_train_seconds"], marked)


@contextmanager
def neighbours(place: Path, *overrides: str) -> Iterator[None]:
    """Three trainings that do not end, each past its first epoch."""
    places = [place / f"neighbour_{number}" for number in range(NEIGHBOURS)]
    commands = [command(p, *overrides, "epochs=100000", f"seed={seed}") for seed, p in enumerate(places, 2)]
    processes = [subprocess.Popen(arguments, stdout=subprocess.DEVNULL) for arguments in commands]
    try:
        while not all((p / "last.pt").exists() for p in places):
            assert all(process.poll() is None for process in processes), "a neighbour has died"
            time.sleep(0.1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare(place: Path, rounds: int, *overrides: str) -> list[tuple[Measured, Measured]]:
    """Pairs of the run alone and beside the others; they take turns to go first."""

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
    title = f"contention: {title}: beside three / alone"
    for quiet, busy in pairs:
        print(
            f"{title}: raw {busy.raw:.1f} / {quiet.raw:.1f} s = {busy.raw / quiet.raw:.2f}, calibrated "
            f"{busy.calibrated:.2f} / {quiet.calibrated:.2f} = {busy.calibrated / quiet.calibrated:.3f}, "
            f"contended epochs {busy.contended:.0%} / {quiet.contended:.0%}"
        )
    raw = statistics.median(busy.raw / quiet.raw for quiet, busy in pairs)
    calibrated = statistics.median(busy.calibrated / quiet.calibrated for quiet, busy in pairs)
    held = "ok" if abs(calibrated - 1) <= LIMIT else "EXCEEDED"
    print(f"{title}: raw {raw:.2f}, calibrated {calibrated:.3f} ({len(pairs)} pairs)   limit 1 +- {LIMIT:.2f} {held}")


def main() -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    chosen = map(int, sys.argv[2].split(",")) if len(sys.argv) > 2 else range(1, 1 + len(SETTINGS))
    for title, (overrides, environment) in [list(SETTINGS.items())[number - 1] for number in chosen]:
        os.environ.update(environment)
        with tempfile.TemporaryDirectory() as place:
            report(title, compare(Path(place), rounds, *overrides))
        for name in environment:
            del os.environ[name]


if __name__ == "__main__":
    main()
