"""In which number and memory formats runs have trained, where `auto` chose them, and in how many processes.

Runs that are averaged have to agree. An experiment sees to it that the runs of an arm do. Those of a grid, or of
several directories, chose their formats each for itself, and may have been started otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from morphtrain.evidence import words
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

BITS, LAST = "precision_bits", "channels_last"  # in records, with precision=auto and memory_format=auto
LAYOUTS = {0.0: "contiguous", 1.0: "channels_last"}
PROCESSES = "processes"  # in records of several


def mixed(table: pd.DataFrame, by: str = "arm") -> list[str]:
    """The groups whose runs did not all choose the same: `dense: 4 runs in 16 bits and 1 run in 32 bits`.

    Args:
        table: a row a run, as `records.ends` gives it.
        by: the column of the groups.
    """
    return _differing(_counts(table, by, _format))


def mixed_processes(table: pd.DataFrame, by: str = "arm") -> list[str]:
    """The groups whose runs trained in different numbers of processes: `dense: 2 runs in one process and ...`."""
    return _differing(_counts(table, by, _processes))


def unlike(table: pd.DataFrame, arm: str) -> list[str]:
    """The arms that chose otherwise than this one did: `narrower in 32 bits`."""
    chosen = {name: list(counts) for name, counts in _counts(table, "arm", _format).items() if len(counts) == 1}
    return [f"{name} {kind}" for name, (kind,) in chosen.items() if arm in chosen and [kind] != chosen[arm]]


def _counts(table: pd.DataFrame, by: str, kind: Callable[[pd.Series], str]) -> dict[str, Counter[str]]:
    """By group, how many runs are of each kind."""
    found: dict[str, Counter[str]] = {}
    for _, run in table.iterrows():
        found.setdefault(str(run[by]), Counter())[kind(run)] += 1
    return found


def _differing(counts: dict[str, Counter[str]]) -> list[str]:
    found = []
    for group, kinds in counts.items():
        parts = [f"{counted(number, 'run')} {kind}" for kind, number in kinds.items()]
        if len(parts) > 1:
            found.append(f"{group}: {words.listed(parts)}")
    return found


def _format(run: pd.Series) -> str:
    """The choice of a run in words; NaN where nothing was chosen."""
    bits, last = run.get(BITS, math.nan), run.get(LAST, math.nan)
    number = "" if math.isnan(bits) else f"{bits:g} bits"
    found = " ".join(filter(None, (number, LAYOUTS.get(last, ""))))
    return f"in {found}" if found else "as typed"


def _processes(run: pd.Series) -> str:
    number = run.get(PROCESSES, math.nan)
    return "in one process" if math.isnan(number) else f"in {number:g} processes"
