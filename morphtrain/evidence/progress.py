"""How far the runs of an experiment have come, and where they ran."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphtrain.errors import UserError
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.records import ends
from morphtrain.plain_data import mismatch
from morphtrain.wording import counted

if TYPE_CHECKING:
    import pandas as pd

ENVIRONMENT = "environment.json"
DISTURBED = "disturbed.jsonl"  # what the records of a run are called that counts for nothing


@dataclass(frozen=True)
class Progress:
    """One declared run: its epochs, whether it has finished, in how many epochs others disturbed it, and its machines.

    `calibrated`: calibrated times allow for what disturbed it.
    `spoilt`: it has failed or was disturbed, and waits to be repeated. `machines` has more than one if the run went on
    elsewhere, and none if it has not begun.
    """

    arm: str
    seed: int
    epochs: int
    finished: bool
    contended: int
    calibrated: bool
    spoilt: bool
    machines: tuple[dict[str, str], ...]

    def __str__(self) -> str:
        if self.spoilt:
            return "to be repeated"
        if not self.machines:
            return "not begun"
        disturbed = f", {self.contended} contended" if self.contended else ""
        epochs = counted(self.epochs, "epoch")
        return f"{epochs}{disturbed}" if self.finished else f"stopped after {self.epochs}{disturbed}"


def progress(directory: Path, experiment: Experiment, table: pd.DataFrame) -> list[Progress]:
    """Every run that is declared, seed by seed, begun or not.

    Args:
        directory: of the experiment.
        table: of `records.load(directory)`.
    """
    last = {(row.arm, row.seed): row for row in ends(table).itertuples()}
    found = []
    for seed in experiment.seeds:
        for arm in experiment.arms:
            run, row = directory / str(seed) / arm, last.get((arm, seed))
            done = (0, False, 0, False)
            if row is not None:
                done = int(row.epoch), bool(row.finished), int(row.contended_epochs), bool(row.calibrated)
            found.append(Progress(arm, seed, *done, (run / DISTURBED).exists(), machines(run / ENVIRONMENT)))
    return found


def machines(path: Path) -> tuple[dict[str, str], ...]:
    """The machines that a run was on, as its environment.json says; none without that file.

    Raises:
        UserError: if it is damaged.
    """
    if not path.exists():
        return ()
    try:
        facts: Any = json.loads(path.read_text())
    except ValueError as error:  # no JSON, no UTF-8
        raise UserError(f"{path}: damaged, it is no JSON ({error})") from error
    if wrong := mismatch(facts, dict[str, Any], "it"):
        raise UserError(f"{path}: damaged, {wrong}")
    before = facts.pop("before", [])
    parts = [*(before if isinstance(before, list) else [before]), facts]
    if wrong := mismatch(parts, list[dict[str, str]], "a machine"):
        raise UserError(f"{path}: damaged, {wrong}")
    return tuple(parts)
