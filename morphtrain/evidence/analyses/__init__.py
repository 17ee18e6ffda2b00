"""What an experiment's records answer: a module for each kind of analysis that a declaration can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphtrain.evidence.analyses import curves, factor, line, no_worse, pays, ratio
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.section import Section

if TYPE_CHECKING:
    import pandas as pd

ANALYSES = {
    "pays": pays.section,
    "ratio": ratio.section,
    "no_worse": no_worse.section,
    "factor": factor.section,
    "line": line.section,
    "curves": curves.section,
}


def section(experiment: Experiment, table: pd.DataFrame) -> Section:
    """The section of an experiment. Numbers that its statistics refuse, such as ratios of 0, are its answer.

    Args:
        table: of `records.load` of its runs, those that have finished.
    """
    try:
        return ANALYSES[experiment.analysis](experiment, table)
    except ValueError as refusal:
        return Section(f"These numbers cannot be analysed: {refusal}.", "None.")
