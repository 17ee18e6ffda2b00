"""Compare variants of the same work in one process, A B B A or B A A B by chance, and report ratios of paired times.

A machine's speed drifts by more than what is measured here; neighbours in time share the drift.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

from morphtrain.compare.turns import in_turns


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each variant in each round; the second round of two has the reverse order of the first."""

    def timed(work: Callable[[], object]) -> Iterator[float]:
        for _ in range(warmup + rounds):
            start = time.perf_counter()
            work()
            yield time.perf_counter() - start

    sides = {name: timed(work) for name, work in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for name, spent in in_turns(sides, warmup):
        seconds[name].append(spent)
    return {name: spent[warmup:] for name, spent in seconds.items()}


def report(title: str, seconds: Mapping[str, list[float]], baseline: str, limit: float | None = None) -> None:
    """Print the median ratio of every variant to `baseline`, with its quartiles, and the limit it is held to."""
    for name, values in seconds.items():
        if name == baseline:
            continue
        ratios = [a / b for a, b in zip(values, seconds[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        held = "" if limit is None else f"   limit {limit:.2f} {'ok' if middle <= limit else 'EXCEEDED'}"
        print(
            f"{title}: {name} / {baseline} = {middle:.4f} (quartiles {low:.4f} to {high:.4f}, {len(ratios)} pairs; "
            f"{1e3 * statistics.median(seconds[baseline]):.1f} ms){held}"
        )
