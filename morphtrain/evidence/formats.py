"""In which number and memory formats runs have trained, where `auto` chose them: runs that are averaged have to agree.

An experiment sees to it that the runs of an arm do. Those of a grid, or of several directories, chose each for itself.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from morphtrain.evidence import words
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

BITS, LAST = "precision_bits", "channels_last"  # in records, with precision=auto and memory_format=auto
LAYOUTS = {0.0: "contiguous", 1.0: "channels_last"}


def mixed(table: pd.DataFrame, by: str = "arm") -> list[str]:
    """The groups whose runs did not all choose the same: `dense: 4 runs in 16 bits and 1 run in 32 bits`.

    Args:
        table: a row a run, as `records.ends` gives it.
        by: the column of the groups.
    """
    found = []
    for group, counts in _chosen(table, by).items():
        parts = [f"{counted(number, 'run')} {kind}" for kind, number in counts.items()]
        if len(parts) > 1:
            found.append(f"{group}: {words.listed(parts)}")
    return found


def unlike(table: pd.DataFrame, arm: str) -> list[str]:
    """The arms that chose otherwise than this one did: `narrower in 32 bits`."""
    chosen = {name: list(counts) for name, counts in _chosen(table, "arm").items() if len(counts) == 1}
    return [f"{name} {kind}" for name, (kind,) in chosen.items() if arm in chosen and [kind] != chosen[arm]]


def _chosen(table: pd.DataFrame, by: str) -> dict[str, Counter[str]]:
    """By group, how many runs chose each format."""
    found: dict[str, Counter[str]] = {}
    for _, run in table.iterrows():
        kind = _format(run.get(BITS, math.nan), run.get(LAST, math.nan))
        found.setdefault(str(run[by]), Counter())[kind] += 1
    return found


def _format(bits: float, last: float) -> str:
    """The choice of a run in words; NaN where nothing was chosen."""
    number = "" if math.isnan(bits) else f"{bits:g} bits"
    found = " ".join(filter(None, (number, LAYOUTS.get(last, ""))))
    return f"in {found}" if found else "as typed"
