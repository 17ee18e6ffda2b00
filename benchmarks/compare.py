"""Does `morphtrain.compare` tell the truth? The same config twice, and one with a tenth more work, 20 times each.

    python compare.py [TRIES [quiet] [same] [more]]

Each try measures ten pairs of epochs, and takes the answer that the command gives: by the clock, or by CPU seconds
where others are busy. The same config twice has to give an interval with 1 in it, which an interval of 95 % does in 19
of 20, with the machine to itself and while another run trains on all cores. There, a config whose epochs have 44 steps
instead of 40 has to be found slower. It takes some five minutes, less with some of the three rows; nothing else should
run meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import morphtrain
from morphtrain.compare.measure import measure
from morphtrain.compare.report import decisive, ratio
from morphtrain.evidence.repeats import Estimate

PAIRS, LEAST, MORE = 10, 18, 1.1
TRAIN_SAMPLES, BATCH = 640, 16
RUN = (
    "data=synthetic",
    "data.image_size=16",
    "data.val_samples=16",
    "model.width=8",
    f"batch_policy.batch_size={BATCH}",
    f"epochs={1 + PAIRS}",
    "timing.cores=1",
)


class Try(NamedTuple):
    """The answer, and whether it is of CPU seconds."""

    found: Estimate
    computed: bool


def tried(work: float) -> Try:
    configs = [
        morphtrain.compose(*RUN, f"data.train_samples={round(TRAIN_SAMPLES * factor)}") for factor in (1.0, work)
    ]
    measured = measure(configs)
    turns = decisive({None: measured})
    found = ratio(turns)
    assert found is not None
    return Try(found, turns[0] is measured.cpu_turns)


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """Another run, with a thread on every core, past its first epoch."""
    with tempfile.TemporaryDirectory() as directory:
        words = ["model.width=32", "epochs=100000", "tracking=none", f"hydra.run.dir={directory}"]
        threads = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        process = subprocess.Popen(
            [sys.executable, "-m", "morphtrain.run", *words], env=threads, stdout=subprocess.DEVNULL
        )
        try:
            while not Path(directory, "last.pt").exists():
                assert process.poll() is None, "the neighbour has died"
                time.sleep(0.1)
            yield
        finally:
            process.kill()
            process.wait()


def main() -> None:
    tries = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rows = sys.argv[2:] or ["quiet", "same", "more"]
    if "quiet" in rows:
        report("the same config twice", [tried(1.0) for _ in range(tries)], has_one)
    if rows == ["quiet"]:
        return
    with neighbour():
        if "same" in rows:
            report("the same config twice, beside another run", [tried(1.0) for _ in range(tries)], has_one)
        if "more" in rows:
            report("a tenth more work, beside another run", [tried(MORE) for _ in range(tries)], above_one)


def has_one(found: Estimate) -> bool:
    return found.low <= 1 <= found.high


def above_one(found: Estimate) -> bool:
    return found.low > 1


def report(title: str, results: Sequence[Try], right: Callable[[Estimate], bool]) -> None:
    estimates = [one.found for one in results]
    count, tries, computed = sum(map(right, estimates)), len(results), sum(one.computed for one in results)
    middle = statistics.median(found.mean for found in estimates)
    width = statistics.median(found.high / found.low - 1 for found in estimates)
    limit = LEAST * tries / 20
    print(
        f"compare: {title}: right in {count} of {tries}   limit {limit:g} {'ok' if count >= limit else 'MISSED'} "
        f"(median ratio {middle:.4f}, median width of the interval {width:.1%}, {PAIRS} pairs a try, "
        f"{computed} by CPU seconds)",
        flush=True,
    )
    for found in estimates:
        if not right(found):
            print(f"    wrong: {found}")


if __name__ == "__main__":
    main()
