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
from morphtrain.evidence.interleaved import FOREIGN, Turns, doubts
from morphtrain.evidence.repeats import Estimate, estimate, paired_ratio
from morphtrain.files import write_atomically
from morphtrain.wording import counted

ACCURACIES = {"val_accuracy": "validation accuracy at the end", "test_accuracy": "test accuracy at the end"}

Repeats = Mapping[int | None, Measured]  # by seed; None: the configs' own
Row = tuple[str, ...]  # name, of A, of B, B against A, what that rests on


def show(sides: Mapping[str, str], repeats: Repeats) -> None:
    """Print what the repeats gave; `sides` says what was typed for each."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    first = next(iter(repeats.values()))
    unit, parts = first.turns.unit, first.turns.parts
    for name, words in sides.items():
        console.print(f"{name}: {words}")
    where = f"{first.machine['processor']}, {counted(int(first.machine['threads']), 'thread')}"
    console.print(
        f"in turns A B B A or B A A B, {f'by {unit}' if parts == 1 else f'{parts} an epoch'}, on {where}; before "
        f"that each side warms up for {counted(first.warmup, unit)}"
    )
    console.print(table(repeats))
    for seed, measured in repeats.items():
        for doubt in doubts(measured.turns):
            console.print(f"{'doubtful' if seed is None else f'seed {seed} is doubtful'}: {doubt}")
    turns = decisive(repeats)
    if turns[0] is not first.turns:
        console.print("since others were busy on these cores, what follows is of the CPU seconds")
    console.print(answer(unit, ratio(turns)))


def answer(unit: str, found: Estimate | None) -> str:
    """The result in a sentence."""
    if found is None or found.low is None or found.high is None:
        took = "" if found is None else f": B took {found.mean:.3g} of A's time"
        return f"It cannot be told which is faster, too little was measured for an interval{took}."
    interval = f"95 % interval {found.low:.3f} to {found.high:.3f}"
    if found.low <= 1 <= found.high:
        return f"No difference is shown: B takes {found.mean:.3f} of the time that A takes for {_a(unit)} ({interval})."
    return f"B takes {found.mean:.3f} of the time that A takes for {_a(unit)} ({interval})."


def decisive(repeats: Repeats) -> list[Turns]:
    """The times that the answer rests on: the clock's, or CPU seconds where others were busy on the same cores.

    What others take of a core at one moment and not at the next swamps the clock, and is no part of CPU seconds.
    """
    disturbed = any((measured.turns.foreign_cpu or 0.0) > FOREIGN for measured in repeats.values())
    computed = cpu_turns(repeats)
    return computed if disturbed and computed else [measured.turns for measured in repeats.values()]


def cpu_turns(repeats: Repeats) -> list[Turns]:
    """The CPU seconds of each repeat; none if this process does not do all the work."""
    return [measured.cpu_turns for measured in repeats.values() if measured.cpu_turns is not None]


def ratio(each: Sequence[Turns]) -> Estimate | None:
    """B / A of an epoch or a step: from the blocks of one measurement, or paired by seed from several."""
    found = [turns.ratio for turns in each]
    if len(found) == 1:
        return found[0]
    means = {number: one.mean for number, one in enumerate(found) if one is not None}
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
    found = [_of_all("seconds", [measured.turns for measured in several])]
    found += [_of_seed(seed, measured) for seed, measured in repeats.items() if len(several) > 1]
    found += _per_image(several[0], ratio(decisive(repeats)))
    if computed := cpu_turns(repeats):
        found.append(_of_all("CPU seconds", computed))
    if all(set(measured.records) == {"A", "B"} and measured.records["A"] for measured in several):
        found.append(_at_end("train_seconds in all", several, "train_seconds", _ratio_of_all, _seconds))
        for metric, name in ACCURACIES.items():
            if all(metric in records[-1] for measured in several for records in measured.records.values()):
                found.append(_at_end(name, several, metric, _difference, lambda value: f"{value:.4f}"))
    return found


def _of_all(name: str, each: Sequence[Turns]) -> Row:
    """Medians over all repeats, and B against A."""
    found = counted(sum(len(turns.ratios) for turns in each), each[0].block)
    rests = found if len(each) == 1 else f"{len(each)} seeds, {found}"
    medians = (statistics.median(time for turns in each for time in getattr(turns, side)) for side in "ab")
    return f"{name} {_a(each[0].unit)}", *map(_seconds, medians), str(ratio(each) or "-"), rests


def _of_seed(seed: int | None, measured: Measured) -> Row:
    turns = measured.turns
    medians = (statistics.median(side) for side in (turns.a, turns.b))
    return f"  seed {seed}", *map(_seconds, medians), str(turns.ratio or "-"), ""


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
    turns = decisive(repeats)
    found = ratio(turns)
    first = next(iter(repeats.values()))
    content = {
        "sides": sides,
        "unit": first.turns.unit,
        "ratio_of": "seconds" if turns[0] is first.turns else "cpu_seconds",
        "ratio": None if found is None else asdict(found),
        "repeats": [
            {
                "seed": seed,
                "configs": configs[seed],
                "turns_of_epoch": measured.turns.parts,
                "warmup": measured.warmup,
                "spent": {name: [one._asdict() for one in side] for name, side in measured.spent.items()},
                "foreign_cpu": measured.turns.foreign_cpu,
                "doubts": doubts(measured.turns),
                "records": measured.records,
                "machine": measured.machine,
            }
            for seed, measured in repeats.items()
        ],
    }
    write_atomically(path, json.dumps(content, indent=1).encode())
