"""What an experiment has found, on the console: the report's answer, and a line for each arm."""

from __future__ import annotations

import sys
from pathlib import Path


def show_answer(directory: Path) -> None:
    """Print the answer to an experiment's question, what limits it, and all arms in one table.

    Args:
        directory: of an experiment whose runs have ended.

    Raises:
        UserError: for records that are damaged.
    """
    from rich.console import Console  # with what follows a second, which the end of an experiment can wait
    from rich.table import Table

    from morphtrain.evidence.summary import summary
    from morphtrain.report.build import read
    from morphtrain.report.tables import shown

    question = read(directory, directory.parent)
    try:
        found = shown(summary(question.experiment, question.finished))
    except ValueError as refusal:  # of a statistic, such as the ratio of a metric that is 0
        print(f"no table of the arms: {refusal}")
    else:
        table = Table(title=found.caption, title_justify="left")
        for column in found.columns:
            table.add_column(column.name, justify="right" if column.number else "left", overflow="fold")
        for row in found.rows:
            table.add_row(*map(str, row))
        Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(table)
    print(f"answer: {question.answer}")
    for note in question.notes:
        print(f"note: {note}")
