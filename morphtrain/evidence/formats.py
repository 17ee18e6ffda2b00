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
    """The groups whose runs did not all choose the same: `dense: 4 runs in 16 bits, 1 run in 32 bits`.

    Args:
        table: a row a run, as `records.ends` gives it.
        by: the column of the groups.
    """
    found = []
    for group, runs in table.groupby(by, sort=False):
        counts = Counter(_format(run.get(BITS, math.nan), run.get(LAST, math.nan)) for _, run in runs.iterrows())
        if len(counts) > 1:
            parts = [f"{counted(number, 'run')} {kind}" for kind, number in counts.items()]
            found.append(f"{group}: {words.listed(parts)}")
    return found


def _format(bits: float, last: float) -> str:
    """The choice of a run in words; NaN where nothing was chosen."""
    number = "" if math.isnan(bits) else f"{bits:g} bits"
    found = " ".join(filter(None, (number, LAYOUTS.get(last, ""))))
    return f"in {found}" if found else "as typed"
