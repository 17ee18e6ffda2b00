"""Arms whose runs came to the same numbers: they are one method by two names, or compute it in different ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

OF_THE_MACHINE = ("second", "time", "contended", "foreign_cpu", "memory")  # in metrics of where and when a run ran
COMPUTED = ("loss", "accuracy")  # without which records do not show what was computed


def groups(table: pd.DataFrame, arms: Sequence[str]) -> list[list[str]]:
    """The arms that agree in every metric but times, in every epoch of all seeds that they have in common.

    Args:
        table: of `records.load`, runs that have finished.
    """
    metrics = [name for name in table.columns if table[name].dtype.kind in "iuf" and _is_computed(name)]
    if not any(part in name for name in metrics for part in COMPUTED):
        return []
    runs = {arm: _by_seed(table[table["arm"] == arm], metrics) for arm in arms}
    found: list[list[str]] = []
    for arm in arms:
        for group in found:
            if all(_agree(runs[arm], runs[other]) for other in group):
                group.append(arm)
                break
        else:
            found.append([arm])
    return [group for group in found if len(group) > 1]


def _is_computed(name: str) -> bool:
    """Whether it is a metric, and neither a config key nor of the machine."""
    return "." not in name and not any(part in name for part in OF_THE_MACHINE)


def _by_seed(rows: pd.DataFrame, metrics: Sequence[str]) -> dict[int, pd.DataFrame]:
    return {int(seed): run[list(metrics)].reset_index(drop=True) for seed, run in rows.groupby("seed")}


def _agree(runs: dict[int, pd.DataFrame], others: dict[int, pd.DataFrame]) -> bool:
    common = runs.keys() & others.keys()
    return bool(common) and all(runs[seed].equals(others[seed]) for seed in common)
