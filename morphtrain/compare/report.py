"""What a comparison says: the answer in a sentence, a table, and what makes it doubtful; and all of it as JSON."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from morphtrain.compare.measure import Measured
from morphtrain.evidence.interleaved import block_ratio, blocks, doubts
from morphtrain.evidence.repeats import Estimate, estimate, paired_ratio
from morphtrain.files import write_atomically

ACCURACIES = {"val_accuracy": "validation accuracy at the end", "test_accuracy": "test accuracy at the end"}

Repeats = Mapping[int | None, Measured]  # by seed; None: the configs' own
Row = tuple[str, ...]  # name, of A, of B, B against A, what that rests on


def show(sides: Mapping[str, str], repeats: Repeats) -> None:
    """Print what the repeats gave; `sides` says what was typed for each."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    first = next(iter(repeats.values()))
    unit = first.turns.unit
    for name, words in sides.items():
        console.print(f"{name}: {words}")
    where = f"{first.machine['processor']}, {first.machine['threads']} threads"
    console.print(f"in turns A B B A, by {unit}, on {where}; of each side {first.warmup} to warm up do not count")
    console.print(table(repeats))
    for seed, measured in repeats.items():
        for doubt in doubts(measured.turns):
            console.print(f"{'doubtful' if seed is None else f'seed {seed} is doubtful'}: {doubt}")
    console.print(answer(unit, ratio(repeats)))


def answer(unit: str, found: Estimate | None) -> str:
    """The result in a sentence."""
    if found is None or found.low is None or found.high is None:
        took = "" if found is None else f": B took {found.mean:.3g} of A's time"
        return f"It cannot be told which is faster, too little was measured for an interval{took}."
    interval = f"95 % interval {found.low:.3f} to {found.high:.3f}"
    if found.low <= 1 <= found.high:
        return f"No difference is shown: B takes {found.mean:.3f} of the time that A takes for {_a(unit)} ({interval})."
    return f"B takes {found.mean:.3f} of the time that A takes for {_a(unit)} ({interval})."


def ratio(repeats: Repeats) -> Estimate | None:
    """B / A of the time of an epoch or a step: from the blocks of one measurement, or paired by seed from several."""
    each = [block_ratio(measured.turns.a, measured.turns.b) for measured in repeats.values()]
    if len(each) == 1:
        return each[0]
    means = {number: found.mean for number, found in enumerate(each) if found is not None}
    return paired_ratio(means, dict.fromkeys(means, 1.0))


def table(repeats: Repeats) -> Table:
    """The medians of each side, and B against A."""
    made = Table()
    for name in ("", "A", "B", "B / A", "from"):
        made.add_column(name, justify="right" if name in ("A", "B") else "left")
    for row in rows(repeats):
        made.add_row(*row)
    return made


def rows(repeats: Repeats) -> list[Row]:
    """The rows of the table; accuracies and totals only if both sides have trained to their end."""
    several = list(repeats.values())
    turns = [measured.turns for measured in several]
    number = sum(len(blocks(turn.a, turn.b)[0]) for turn in turns)
    rests = f"{number} blocks of A B B A" if len(several) == 1 else f"{len(several)} seeds, {number} blocks"
    medians = (statistics.median(time for turn in turns for time in getattr(turn, side)) for side in "ab")
    found = [(f"seconds {_a(turns[0].unit)}", *map(_seconds, medians), str(ratio(repeats) or "-"), rests)]
    found += [_of_seed(seed, measured) for seed, measured in repeats.items() if len(several) > 1]
    found += _per_image(several[0], ratio(repeats))
    if all(set(measured.records) == {"A", "B"} and measured.records["A"] for measured in several):
        found.append(_at_end("train_seconds in all", several, "train_seconds", _ratio_of_all, _seconds))
        for metric, name in ACCURACIES.items():
            if all(metric in records[-1] for measured in several for records in measured.records.values()):
                found.append(_at_end(name, several, metric, _difference, lambda value: f"{value:.4f}"))
    return found


def _of_seed(seed: int | None, measured: Measured) -> Row:
    turns = measured.turns
    medians = (statistics.median(side) for side in (turns.a, turns.b))
    return f"  seed {seed}", *map(_seconds, medians), str(block_ratio(turns.a, turns.b) or "-"), ""


def _per_image(measured: Measured, found: Estimate | None) -> list[Row]:
    """A step of another batch size is another amount of work."""
    sizes = measured.batch_sizes
    if measured.turns.unit == "epoch" or len(set(sizes.values())) < 2 or found is None:
        return []
    return [
        ("  an image", "", "", f"{found.mean * sizes['A'] / sizes['B']:.4g}", f"batches of {sizes['A']}, {sizes['B']}")
    ]


def _at_end(
    name: str,
    several: Sequence[Measured],
    metric: str,
    against: Callable[[Sequence[float], Sequence[float]], str],
    shown: Callable[[float], str],
) -> Row:
    """A metric of the last record: means over the seeds, and B against A paired by seed."""
    a, b = ([measured.records[side][-1][metric] for measured in several] for side in "AB")
    n = len(several)
    rests = f"{n} seeds" if n > 1 else "one seed, so no interval"
    return name, shown(statistics.fmean(a)), shown(statistics.fmean(b)), against(a, b), rests


def _ratio_of_all(a: Sequence[float], b: Sequence[float]) -> str:
    return str(paired_ratio(dict(enumerate(b)), dict(enumerate(a))))


def _difference(a: Sequence[float], b: Sequence[float]) -> str:
    return f"B - A = {estimate([after - before for before, after in zip(a, b, strict=True)])}"


def _a(unit: str) -> str:
    return {"epoch": "an epoch", "step": "a step"}[unit]


def _seconds(value: float) -> str:
    return f"{value:.4g}"


def write(path: Path, sides: Mapping[str, str], configs: Mapping[int | None, Any], repeats: Repeats) -> None:
    """Write everything as JSON: what the sides are, their configs, all times, records and the machine, by seed."""
    found = ratio(repeats)
    content = {
        "sides": sides,
        "unit": next(iter(repeats.values())).turns.unit,
        "ratio": None if found is None else asdict(found),
        "repeats": [
            {
                "seed": seed,
                "configs": configs[seed],
                "warmup": measured.warmup,
                "seconds": measured.seconds,
                "foreign_cpu": measured.turns.foreign_cpu,
                "doubts": doubts(measured.turns),
                "records": measured.records,
                "machine": measured.machine,
            }
            for seed, measured in repeats.items()
        ],
    }
    write_atomically(path, json.dumps(content, indent=1).encode())
