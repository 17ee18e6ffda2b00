"""What an analysis finds: an answer, and the tables, the picture and the test that it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from morphtrain.evidence.pictures import Picture
from morphtrain.evidence.regressions import Coefficient

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Table:
    """Numbers of a section, unrounded. The index heads the rows and has a name.

    Columns `x`, `x low` and `x high` are one cell where the table is shown: a value and its interval.
    """

    name: str  # of its CSV file
    caption: str
    frame: DataFrame


@dataclass(frozen=True)
class Section:
    """The answer to a question in a sentence, with its numbers, n and interval, and what it rests on.

    Without tables it is no answer yet, and says what is missing for one. `slope` is that of a line. `is_open`: the
    answer is, at least in part, that it cannot be told yet.
    """

    answer: str
    test: str
    tables: tuple[Table, ...] = ()
    picture: Picture | None = None
    slope: Coefficient | None = None
    is_open: bool = False
