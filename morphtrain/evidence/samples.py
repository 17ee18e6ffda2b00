"""What a test or a regression takes from a table of runs, a row per run: numbers, by group and by pair."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any

from morphtrain.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def by_group(table: pd.DataFrame, by: str, metric: str) -> dict[str, list[float]]:
    """The values of a metric by the values of a column, as text, in the order of the table.

    Raises:
        UserError: if there is no such column, fewer than two groups, or a run without a number.
    """
    groups: dict[str, list[float]] = {}
    for group, value, _ in _rows(table, by, metric, "run"):
        groups.setdefault(group, []).append(value)
    return _two_or_more(groups, by)


def by_pair(table: pd.DataFrame, by: str, metric: str, pair: str) -> dict[str, dict[Any, float]]:
    """The same, and within each group by the values of the column `pair`, such as `seed`.

    Raises:
        UserError: as `by_group`, or if a group has two runs with the same value of `pair`, or all groups have
            none in common.
    """
    groups: dict[str, dict[Any, float]] = {}
    for group, value, key in _rows(table, by, metric, pair):
        if key in groups.setdefault(group, {}):
            raise UserError(f"--paired {pair}: {by}={group} has two runs with {pair}={key}; one each can be paired")
        groups[group][key] = value
    if not set.intersection(*map(set, groups.values())):
        raise UserError(f"--paired {pair}: no value of it is in every group of {by}")
    return _two_or_more(groups, by)


def numbers(table: pd.DataFrame, *names: str) -> list[tuple[float, ...]]:
    """The rows of these columns in which all are finite numbers.

    Raises:
        UserError: if there is no such column, or it holds text.
    """
    columns = [[_number(value, name) for value in _column(table, name)] for name in names]
    return [row for row in zip(*columns, strict=True) if all(map(math.isfinite, row))]


def _rows(table: pd.DataFrame, by: str, metric: str, pair: str) -> list[tuple[str, float, Any]]:
    rows = zip(_column(table, by), _column(table, metric), _column(table, pair), _column(table, "run"), strict=True)
    found = []
    for group, value, key, run in rows:
        if not math.isfinite(number := _number(value, metric)):
            raise UserError(f"{run}: has no {metric}")
        found.append((str(group), number, key))
    return found


def _two_or_more(groups: dict[str, Any], by: str) -> dict[str, Any]:
    if len(groups) < 2:
        raise UserError(f"--by {by}: all runs have the same, {', '.join(groups)}; a comparison needs two groups")
    return groups


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, map(str, table.columns), n=3)
    guess = f"; did you mean {' or '.join(near)}?" if near else "; `table RUNS --csv FILE` writes all that there are"
    raise UserError(f"{name}: no metric, and no config key in which these runs differ{guess}")


def _number(value: Any, name: str) -> float:
    import pandas as pd

    if pd.isna(value):
        return math.nan
    if isinstance(value, str):
        raise UserError(f"{name}: its values are no numbers, such as {value}")
    return float(value)
