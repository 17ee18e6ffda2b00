"""Does `morphtrain.compare` tell the truth? The same config twice, and one with a tenth more work, 20 times each.

    python compare.py [tries]

Each try measures ten pairs of epochs. The same config twice has to give an interval with 1 in it, which an interval of
95 % does in 19 of 20. A config whose epochs have 44 steps instead of 40 has to be found slower while another process
loads all cores by fits and starts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Iterator

import torch

import morphtrain
from morphtrain.compare.measure import measure
from morphtrain.evidence.interleaved import block_ratio
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


def tried(ratio: float) -> Estimate:
    configs = [
        morphtrain.compose(*RUN, f"data.train_samples={round(TRAIN_SAMPLES * factor)}") for factor in (1.0, ratio)
    ]
    found = block_ratio(*(getattr(measure(configs).turns, side) for side in "ab"))
    assert found is not None
    return found


def load(seed: int) -> None:
    """Multiply matrices on all cores for a while, rest for a while, and so on."""
    torch.set_num_threads(multiprocessing.cpu_count())
    rng = random.Random(seed)
    matrix = torch.randn(512, 512)
    while True:
        end = time.perf_counter() + rng.uniform(0.05, 0.5)
        while time.perf_counter() < end:
            matrix @ matrix
        time.sleep(rng.uniform(0.05, 0.5))


@contextlib.contextmanager
def loaded() -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=load, args=(0,), daemon=True)
    process.start()
    time.sleep(3)  # until it has imported torch
    try:
        yield
    finally:
        process.kill()
        process.join()


def main() -> None:
    tries = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    same = [tried(1.0) for _ in range(tries)]
    held = sum(found.low <= 1 <= found.high for found in same)
    report("the same config twice", same, f"interval contains 1 in {held} of {tries}", held, tries)
    with loaded():
        slower = [tried(MORE) for _ in range(tries)]
    seen = sum(found.low > 1 for found in slower)
    report("a tenth more work, under load", slower, f"found in {seen} of {tries}", seen, tries)


def report(title: str, results: list[Estimate], said: str, count: int, tries: int) -> None:
    middle = statistics.median(found.mean for found in results)
    width = statistics.median(found.high / found.low - 1 for found in results)
    limit = LEAST * tries / 20
    print(
        f"compare: {title}: {said}   limit {limit:g} {'ok' if count >= limit else 'MISSED'} "
        f"(median ratio {middle:.4f}, median width of the interval {width:.1%}, {PAIRS} pairs a try)"
    )


if __name__ == "__main__":
    main()
