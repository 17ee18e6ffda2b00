"""The front page: which method pays on this machine, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from morphtrain.evidence.analyses.pays import METHODS
from morphtrain.evidence.frontier import OUTLOOK
from morphtrain.report.question import Question
from morphtrain.report.tables import Column, Link, Shown, shown

TEXT = (
    "A method pays if it is more accurate than the best the dense network gives for the same seconds, trained for "
    "fewer epochs or made narrower, each with its own full schedule. Differences are paired by seed; in brackets is "
    "the 95 % interval. Cannot tell yet: the interval lies neither above 0 nor below the margin, or "
    "above 0 where the dense arms are no measure; its row says what would tell. "
    f"{OUTLOOK}"
)
NONE = "No experiment of the kind that compares methods with the dense network at equal seconds has runs here yet."


@dataclass(frozen=True)
class Front:
    """A text, and the table of all methods if there are any."""

    text: str
    table: Shown | None


def front(questions: Sequence[Question]) -> Front:
    """A row for each arm of a method, of every question about what pays."""
    columns: tuple[Column, ...] = ()
    rows: list[tuple[str | Link, ...]] = []
    for question in questions:
        for table in question.section.tables:
            if table.name == METHODS:
                part = shown(table)
                columns = (*part.columns, Column("question", False))
                rows += [(Link(str(row[0]), question.anchor), *row[1:], question.name) for row in part.rows]
    if not rows:
        return Front(NONE, None)
    return Front(TEXT, Shown("Every method against the dense network at the same seconds.", columns, tuple(rows)))
