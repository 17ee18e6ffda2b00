"""From the directories of experiments to the page and its tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from morphtrain.errors import UserError
from morphtrain.evidence import experiment as declaration
from morphtrain.evidence import records
from morphtrain.evidence.progress import progress
from morphtrain.files import write_atomically
from morphtrain.report import chapter3
from morphtrain.report.front import front
from morphtrain.report.question import Question
from morphtrain.report.svg import palette
from morphtrain.wording import counted, printable

if TYPE_CHECKING:
    import pandas as pd

HERE = Path(__file__).parent
TITLE = "Which training methods pay on this machine"
READING = (
    "Every section begins with its answer. In brackets are 95 % intervals over the seeds, n counts seeds; one seed is "
    "one run of each arm. Accuracy is that on test images that no decision has seen, from 0 to 1."
)


def build(directory: Path, out: Path) -> list[Path]:
    """Write the report about the experiments in and below `directory`; returns the page and its tables.

    The tables are CSV, in a folder beside the page: `ends.csv`, a row a run, and those of every section.

    Raises:
        UserError: if there is no experiment, or one that cannot be read.
        OSError: if nothing can be written there.
    """
    questions = _named_apart([read(path, directory) for path in find(directory)])
    folder = out.with_name(f"{out.stem}-tables")
    tables = _tables(questions)
    page = render(questions, folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        write_atomically(folder / name, printable(frame.to_csv()).encode())
    write_atomically(out, page.encode())
    return [out, *(folder / name for name in tables)]


def find(directory: Path) -> list[Path]:
    """The directories of experiments in and below `directory`, in the order of their names.

    Raises:
        UserError: if there is none.
    """
    found = sorted(path.parent for path in directory.rglob(declaration.FILE))
    if not found:
        raise UserError(
            f"{directory}: no experiment in it or below it (no {declaration.FILE}); run one first, as "
            "python -m morphtrain.run +experiment=reconfigure_interval size=small"
        )
    return found


def read(directory: Path, root: Path) -> Question:
    """An experiment and all that its runs have recorded so far; it is called after its place below `root`."""
    experiment = declaration.load(directory)
    runs = [directory / str(seed) / arm for seed in experiment.seeds for arm in experiment.arms]
    begun = [run for run in runs if (run / records.FILE).exists() and (run / records.FILE).stat().st_size]
    table = records.load(*begun) if begun else _empty()
    place = directory.relative_to(root).parts or (directory.resolve().name,)
    name = re.sub(r"[^\w.-]", "-", "-".join(place))
    return Question(name, experiment, table, progress(directory, experiment, table))


def _named_apart(questions: Sequence[Question]) -> list[Question]:
    """Add a number to a name that is already taken: `a b` and `a-b` would both be called `a-b`."""
    found: dict[str, Question] = {}
    for question in questions:
        name, number = question.name, 1
        while name.lower() in found:
            number += 1
            name = f"{question.name}.{number}"
        found[name.lower()] = replace(question, name=name)
    return list(found.values())


def _empty() -> pd.DataFrame:
    import pandas as pd

    columns = ("run", "experiment", "arm", "seed", "finished", "contended_epochs", "calibrated", "epoch")
    return pd.DataFrame(columns=list(columns))


def render(questions: Sequence[Question], folder: str) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    return environment.get_template("page.html").render(
        title=TITLE,
        style=Markup(palette() + (HERE / "style.css").read_text()),
        summary=_summary(questions),
        reading=READING,
        methods=front(questions),
        questions=questions,
        chapter={"text": chapter3.TEXT, "table": chapter3.table(questions)},
        closing=f"Built by python -m morphtrain.report; the tables as CSV are beside this file, in {folder}/.",
    )


def _printable(value: object) -> object:
    """What the page shows of a value: markup, such as a picture, as it is."""
    return printable(value) if type(value) is str else value


def _summary(questions: Sequence[Question]) -> str:
    runs = [run for question in questions for run in question.progress]
    finished = sum(run.finished for run in runs)
    places = {m.get("processor", "an unknown processor") for run in runs for m in run.machines}
    today = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    where = f", on {' and '.join(sorted(places))}" if places else ""
    asked, all_runs = counted(len(questions), "question"), counted(len(runs), "run")
    return f"{asked}, {finished} of {all_runs} finished{where}. Built {today}."


def _tables(questions: Sequence[Question]) -> dict[str, pd.DataFrame]:
    """By the names of their files."""
    import pandas as pd

    ends = pd.concat([records.ends(question.table) for question in questions], ignore_index=True)
    found = {"ends.csv": ends.set_index("run")}
    for question in questions:
        for table in question.section.tables:
            found[f"{question.name}-{table.name}.csv"] = table.frame
    return found
