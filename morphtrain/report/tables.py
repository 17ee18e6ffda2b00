"""Tables of numbers as rows of text: an interval is one cell, and who reads the page has a name for every gap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from morphtrain.evidence import words
from morphtrain.evidence.section import Table

if TYPE_CHECKING:
    import pandas as pd

LOW, HIGH = " low", " high"
GAP = "-"


@dataclass(frozen=True)
class Column:
    """A column's name, and whether numbers stand in it, one below the other."""

    name: str
    number: bool


@dataclass(frozen=True)
class Link:
    """A cell that leads to a part of the page."""

    text: str
    anchor: str


@dataclass(frozen=True)
class Shown:
    """A table as the page shows it; the first cell of a row is its head."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | Link, ...], ...]


def shown(table: Table) -> Shown:
    """A table of a section, its numbers rounded and its intervals in one cell with their values."""
    frame = table.frame
    names = [str(name) for name in frame.columns if not str(name).endswith((LOW, HIGH))]
    names = [name for name in names if not frame[name].isna().all()]
    columns = [Column(str(frame.index.name or ""), False)]
    columns += [Column(name, frame[name].dtype.kind in "iuf") for name in names]
    rows = [(str(head), *(_cell(row, name) for name in names)) for head, row in frame.iterrows()]
    return Shown(table.caption, tuple(columns), tuple(rows))


def _cell(row: pd.Series[Any], name: str) -> str:
    value = row[name]
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return GAP
    if name + LOW in row.index:
        return words.interval(float(value), row[name + LOW], row[name + HIGH])
    return words.number(float(value))
